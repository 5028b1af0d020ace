"""fsr_* fields of every OpenAI-style request, read off the parsed request at vLLM's renderer: no second JSON parse.

The renderer hook validates, settles the question of each image, and passes plain values on as mm_processor_kwargs,
the channel that offline callers use themselves. A request without fsr fields on a server without a default budget is
left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fsr_vllm import adaptive, compat
from fsr_vllm.params import (
    HOW_TO_ACTIVATE,
    MAX_QUESTION,
    PREFIX,
    SETTINGS_KEY,
    FieldError,
    RequestFields,
    ServerSettings,
    parse_budget_text,
    per_image,
    readable,
    shown,
)

HEADER_FIELD = "x-fsr-budget"


@dataclass
class RequestReport:
    """What one HTTP request asked for by header, and what became of its visual tokens."""

    budget_header: str | None = None
    kept: int = 0
    total: int = 0
    adaptive: int | None = None  # the budget that the load gave images the request named none for


current_report: ContextVar[RequestReport | None] = ContextVar("fsr_report", default=None)


def install(
    questions: Callable[[Any], list[str]], details: Callable[[Any], list[str | None]], supported: tuple[str, ...]
) -> None:
    """Hook vLLM's renderer, once per process; `questions` and `details` read one entry per image off messages."""
    hook = RendererHook(questions, details, supported)
    compat.wrap_renderer(hook.before, hook.after)


class RendererHook:
    """Runs before and after vLLM renders a chat-style request."""

    def __init__(self, questions: Callable[..., Any], details: Callable[..., Any], supported: tuple[str, ...]) -> None:
        self.questions, self.details, self.supported = questions, details, supported

    def before(self, renderer: Any, request: Any, messages: Any) -> None:
        """Validate the request's fsr fields and put the resolved ones where the processor reads them."""
        try:
            self._before(renderer, request, messages)
        except FieldError as error:
            raise compat.request_error(str(error), error.field) from None

    def after(self, engine_inputs: Any) -> None:
        """Note kept and total tokens for the response header."""
        report = current_report.get()
        if report is None:
            return
        for engine_input in engine_inputs:
            kept, total = engine_input.get("fsr_visual_tokens", (0, 0)) if isinstance(engine_input, dict) else (0, 0)
            report.kept += kept
            report.total += total
            if isinstance(engine_input, dict) and "fsr_adaptive" in engine_input:
                report.adaptive = engine_input["fsr_adaptive"]

    def _before(self, renderer: Any, request: Any, messages: Any) -> None:
        values = body_fields(request)
        report = current_report.get()
        header = report.budget_header if report else None
        asked = sorted(values) or ([HEADER_FIELD] if header is not None else [])
        text = getattr(renderer.model_config.hf_config, SETTINGS_KEY, None)
        if text is None:
            if asked:
                raise FieldError(asked[0], f"{asked[0]}: plugin fsr is not active; {HOW_TO_ACTIVATE}")
            return
        processor = getattr(renderer.renderer, "mm_processor", None)
        reason = getattr(processor, "fsr_unsupported", self._not_supported(renderer.model_config))
        if reason:
            if asked:
                raise FieldError(asked[0], f"{asked[0]}: {reason}")
            return
        settings = ServerSettings.from_json(text)
        if header is not None:
            values = with_header(values, header)
        fields = RequestFields.parse(values, settings)
        if not asked and not settings.prunes_by_default:
            return
        questions = self.questions(messages)
        if not questions:
            return  # text only: nothing to prune
        if fields.fsr_budget is None and settings.detail_budgets:
            values["fsr_budget"] = self._by_detail(settings, messages)
        # Said here rather than by the processor, which sees the same lists but later.
        for name in ("fsr_budget", "fsr_question"):
            per_image(values.get(name), len(questions), name)
        # Of a long text the end is read: that is where people put their question.
        values.setdefault("fsr_question", [readable(question[-MAX_QUESTION:]) for question in questions])
        others = getattr(request, "mm_processor_kwargs", None) or {}
        request.mm_processor_kwargs = {**{k: v for k, v in others.items() if not k.startswith(PREFIX)}, **values}

    def _not_supported(self, model_config: Any) -> str:
        names = ", ".join(model_config.architectures)
        return f"architecture {names} is not supported (supported: {', '.join(self.supported)})"

    def _by_detail(self, settings: ServerSettings, messages: Any) -> list[Any]:
        """Per image: the budget its `image_url.detail` maps to, else the default, which may follow the load."""
        details = [detail or "auto" for detail in self.details(messages)]
        default = settings.default_budget
        if settings.adaptive_range is not None and not settings.detail_budgets.keys() >= set(details):
            default = adaptive.default_budget(settings.adaptive_range) or default
            report = current_report.get()
            if report is not None and isinstance(default, int):
                report.adaptive = default
        return [settings.detail_budgets.get(detail, default) for detail in details]


def body_fields(request: Any) -> dict[str, Any]:
    """The fsr_* values of a parsed request: top level, or inside mm_processor_kwargs; null counts as absent.

    Errors: FieldError when the same field stands in both places with different values.
    """
    top = {k: v for k, v in (getattr(request, "model_extra", None) or {}).items() if k.startswith(PREFIX)}
    inner: Mapping[str, Any] = getattr(request, "mm_processor_kwargs", None) or {}
    inner = {k: v for k, v in inner.items() if k.startswith(PREFIX)}
    for name in sorted(set(top) & set(inner)):
        if top[name] != inner[name]:
            raise FieldError(name, f"{name} differs between the request's top level and mm_processor_kwargs")
    return {name: value for name, value in {**inner, **top}.items() if value is not None}


def with_header(values: dict[str, Any], header: str) -> dict[str, Any]:
    """The body's fields with the budget of the `x-fsr-budget` header; FieldError where the two differ."""
    budget = parse_budget_text(header, HEADER_FIELD)
    stated = values.get("fsr_budget", budget)
    if stated != budget or type(stated) is not type(budget):
        raise FieldError(
            "fsr_budget", f"fsr_budget {shown(stated)} in the body differs from {shown(budget)} in {HEADER_FIELD}"
        )
    return {**values, "fsr_budget": budget}
