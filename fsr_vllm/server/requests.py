"""fsr_* fields of every HTTP request, read off the parsed request before vLLM renders it: no second
JSON parse.

They are validated here and passed on as mm_processor_kwargs, the channel that offline callers use
themselves; what the conversation says (questions, details) is settled below, in
`engine.conversation`. A request without fsr fields is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from fsr_vllm.adaptive import LoadMonitor
from fsr_vllm.compat.attributes import RESULT_KEY
from fsr_vllm.compat.errors import request_error
from fsr_vllm.compat.front_end import image_limit
from fsr_vllm.compat.http import wrap_foreign_bodies, wrap_model_check, wrap_pooling, wrap_renderer
from fsr_vllm.compat.version import why_inactive
from fsr_vllm.engine import conversation
from fsr_vllm.params import (
    HOW_TO_ACTIVATE,
    PREFIX,
    SETTINGS_KEY,
    FieldError,
    Report,
    RequestFields,
    ServerSettings,
    parse_budget_text,
    same_budget,
    shown,
)
from fsr_vllm.server import alias, misplaced

HEADER_FIELD = misplaced.BUDGET_HEADER
# Request classes that may hold images and have a way of their own to the engine, where no field of
# ours is read.
UNREAD = {
    "GenerateRequest": "images arrive rendered here; give the budget to the endpoint that renders them",
    "ScoringRequestMixin": "scoring endpoints do not prune",
}


@dataclass
class RequestReport:
    """What one HTTP request asked for outside vLLM's request object, and what became of its visual
    tokens.
    """

    budget_header: str | None = None
    wrong_header: FieldError | None = None  # why a header that looks like ours is none
    body: dict[str, Any] = field(
        default_factory=dict
    )  # fsr_* of a body whose request model drops them
    kept: int = 0
    total: int = 0
    adaptive: int | None = None  # the budget that the load gave images the request named none for
    monitor: LoadMonitor | None = None  # of the load, where this request can become part of it
    counted: bool = False

    def count(self) -> None:
        """From now on the request is load: its body is read and parsed, and its model is one that
        is served here.
        """
        if self.monitor is not None and not self.counted:
            self.counted = True
            self.monitor.enter()

    def close(self) -> None:
        """The request was answered, or went away."""
        if self.monitor is not None and self.counted:
            self.monitor.leave()


current_report: ContextVar[RequestReport | None] = ContextVar("fsr_report", default=None)


def install(unsupported: Callable[[Any], str | None], model_alias: bool = False) -> None:
    """Hook vLLM's serving surfaces, once per process; `unsupported` says why a model config's
    images cannot be pruned.

    Errors: ValueError if names with a budget are to be served and this vLLM does not let them.
    """
    hook = RequestHook(unsupported)
    wrap_renderer(hook.before, hook.after)
    wrap_pooling(hook.before_body, hook.after)
    wrap_foreign_bodies(hook.note)
    if not wrap_model_check(alias.split, hook.accept) and model_alias:
        raise ValueError(
            "fsr.model_alias: this version of vLLM checks model names where plugin fsr cannot help it"
        )


class RequestHook:
    """Runs before and after vLLM renders a request."""

    def __init__(self, unsupported: Callable[[Any], str | None]) -> None:
        self.unsupported = unsupported

    def before(self, renderer: Any, request: Any) -> None:
        """Validate the request's fsr fields and put them where the processor reads them."""
        values = self._checked(renderer.model_config, request)
        _count_load()
        if values:
            others = getattr(request, "mm_processor_kwargs", None) or {}
            kwargs = {**{k: v for k, v in others.items() if not k.startswith(PREFIX)}, **values}
            # Not a field of every request model; one that neither has it nor takes more has no
            # images to prune.
            takes_more = getattr(type(request), "model_config", {}).get("extra") == "allow"
            if takes_more or hasattr(request, "mm_processor_kwargs"):
                request.mm_processor_kwargs = kwargs

    def before_body(self, renderer: Any, request: Any) -> None:
        """`before` for a request whose model may drop what it does not know: `model_extra` is the
        whole body here.
        """
        self._search(renderer.model_config, request.model_extra)
        self.before(renderer, request)

    def note(self, model_config: Any, body: Any) -> None:
        """Keep the fsr_* fields of a body whose request model drops them (Anthropic, Cohere)."""
        if not isinstance(body, Mapping):
            return
        self._search(model_config, body)
        try:
            fields = merged(_ours(body), _ours(body.get("mm_processor_kwargs")))
            fields = merged(fields, _from_xargs(body.get("vllm_xargs")))
            self._refuse(model_config, min(fields, default=None))
        except FieldError as error:
            raise request_error(str(error), error.field) from None
        report = current_report.get()
        if report is not None:
            report.body = fields

    def after(self, engine_inputs: Any) -> None:
        """Note kept and total tokens for the response header."""
        report = current_report.get()
        if report is None:
            return
        for engine_input in engine_inputs:
            found = engine_input.get(RESULT_KEY) if isinstance(engine_input, dict) else None
            if isinstance(found, Report):
                report.kept += found.kept
                report.total += found.total
                report.adaptive = found.by_load or report.adaptive

    def accept(self, model_config: Any, request: Any, suffix: str | None) -> None:
        """After vLLM knows the model: the budget behind its name, and fields that this endpoint
        cannot honour.
        """
        try:
            alias.accept(model_config, suffix, self.unsupported)
        except FieldError as error:
            raise request_error(str(error), error.field) from None
        self._search(model_config, request)
        values = self._checked(model_config, request)
        reason = next(
            (UNREAD[kind.__name__] for kind in type(request).__mro__ if kind.__name__ in UNREAD),
            None,
        )
        report = current_report.get()
        if values and reason:
            fallback = HEADER_FIELD if report and report.budget_header is not None else "model"
            name = min(body_fields(request), default=fallback)
            raise request_error(f"{name}: no budget can be given on this endpoint: {reason}", name)
        _count_load()
        if values and report is not None:
            report.body = values  # some endpoints render a request of their own making

    def _search(self, model_config: Any, request: Any) -> None:
        """Refuse fields of ours in a wrong place or spelling; once per request, since its content
        parts are read.
        """
        report = current_report.get()
        found = misplaced.in_body(request, image_limit(model_config))
        found = found or (report.wrong_header if report else None)
        if found is not None:
            reason = self._reason(model_config)
            message = f"{found.field}: {reason}" if reason else str(found)
            raise request_error(message, found.field)

    def _reason(self, model_config: Any) -> str | None:
        """Why no request of this server can have fields; None if it can."""
        if getattr(model_config.hf_config, SETTINGS_KEY, None) is None:
            return why_inactive(HOW_TO_ACTIVATE)
        return self.unsupported(model_config)

    def _refuse(self, model_config: Any, name: str | None) -> None:
        """FieldError for the field `name`, if there is one and this server cannot honour it."""
        reason = self._reason(model_config) if name is not None else None
        if name is not None and reason:
            raise FieldError(name, f"{name}: {reason}")

    def _checked(self, model_config: Any, request: Any) -> dict[str, Any]:
        try:
            return self._values(model_config, request)
        except FieldError as error:
            raise request_error(str(error), error.field) from None

    def _values(self, model_config: Any, request: Any) -> dict[str, Any]:
        values = body_fields(request)
        report = current_report.get()
        header = report.budget_header if report else None
        asked = sorted(values) or ([HEADER_FIELD] if header is not None else [])
        budget = alias.budget()
        if not asked and budget is None:
            return {}
        self._refuse(model_config, asked[0] if asked else "model")
        settings = ServerSettings.from_json(getattr(model_config.hf_config, SETTINGS_KEY))
        if header is not None:
            values = with_header(values, header, settings)
        if budget is not None:
            values.setdefault("fsr_budget", budget)
        conversation.check_lengths(model_config, values)
        RequestFields.parse(values, settings)
        return values


def _count_load() -> None:
    report = current_report.get()
    if report is not None:
        report.count()


def body_fields(request: Any) -> dict[str, Any]:
    """The fsr_* values of a parsed request: top level, mm_processor_kwargs or vllm_xargs; null
    counts as absent.

    Errors: FieldError when the same field stands in two places with different values.
    """
    report = current_report.get()
    values = merged(
        _ours(getattr(request, "model_extra", None)),
        _ours(getattr(request, "mm_processor_kwargs", None)),
    )
    values = merged(values, _from_xargs(getattr(request, "vllm_xargs", None)))
    return merged(values, report.body if report else {})


def merged(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    """Both; FieldError where they differ."""
    for name in sorted(set(left) & set(right)):
        alike = left[name] == right[name] and type(left[name]) is type(right[name])
        if not alike and not (name == "fsr_budget" and same_budget(left[name], right[name])):
            raise FieldError(
                name, f"{name} stands in two places of the request with different values"
            )
    return {**right, **left}


def _ours(values: Any) -> dict[str, Any]:
    given = values if isinstance(values, Mapping) else {}
    return {k: v for k, v in given.items() if k.startswith(PREFIX) and v is not None}


def _from_xargs(values: Any) -> dict[str, Any]:
    """Fields in vLLM's own carrier of extra arguments, which holds no objects: fsr_options is JSON
    text there.
    """
    fields = _ours(values)
    if isinstance(fields.get("fsr_options"), str):
        try:
            fields["fsr_options"] = json.loads(fields["fsr_options"])
        except (ValueError, RecursionError):
            raise FieldError(
                "fsr_options", "fsr_options in vllm_xargs must be a JSON object, as text"
            ) from None
    return fields


def with_header(values: dict[str, Any], header: str, settings: ServerSettings) -> dict[str, Any]:
    """The body's fields with the budget of the `x-fsr-budget` header; FieldError where the two
    differ.

    A budget of the header alone is judged under the header's name, one of both under the body's.
    """
    budget = header_budget(header)
    if "fsr_budget" not in values:
        for one in budget if isinstance(budget, list) else [budget]:
            settings.check_bounds(one, HEADER_FIELD, settings.tokens_per_image)
    stated = values.get("fsr_budget", budget)
    if not same_budget(stated, budget):
        raise FieldError(
            "fsr_budget",
            f"fsr_budget {shown(stated)} in the body differs from {shown(budget)} in {HEADER_FIELD}",
        )
    return {**values, "fsr_budget": budget}


def header_budget(text: str) -> Any:
    """The budget of one or several `x-fsr-budget` lines, which HTTP joins by commas; FieldError
    where two differ.
    """
    one, *others = dict.fromkeys(_lines(text))
    budget = parse_budget_text(one, HEADER_FIELD)
    for other in others:
        if not same_budget(parse_budget_text(other, HEADER_FIELD), budget):
            raise FieldError(
                HEADER_FIELD, f"{HEADER_FIELD} is there more than once, with different budgets"
            )
    return budget


def _lines(text: str) -> list[str]:
    """Header values apart: at the commas that stand outside of a list."""
    depth = 0
    lines: list[list[str]] = [[]]
    for piece in text.split(","):
        if depth <= 0 and lines[-1]:
            lines.append([])
        lines[-1].append(piece)
        depth += piece.count("[") - piece.count("]")
    return [",".join(line).strip() for line in lines]
