"""fsr_* fields of every HTTP request, read off the parsed request before vLLM renders it.

They are validated here, once, and passed on as one `FsrRequest` in mm_processor_kwargs; the JSON is
not parsed again. What the conversation says (questions, details) is settled below, where
conversations are rendered.
"""

from __future__ import annotations

from collections.abc import Mapping

from fsr_vllm.compat.attributes import RESULT_KEY
from fsr_vllm.compat.errors import as_request_errors
from fsr_vllm.compat.front_end import image_limit
from fsr_vllm.compat.http import wrap_foreign_bodies, wrap_model_check, wrap_pooling, wrap_renderer
from fsr_vllm.compat.types import EngineInputs, HttpRequest, ModelConfig, Renderer
from fsr_vllm.params import (
    NOTHING,
    FieldError,
    FsrRequest,
    Report,
    RequestFields,
    read_settings,
    refusal,
    request_of,
    with_request,
)
from fsr_vllm.server import fields, misplaced, model_alias
from fsr_vllm.server.report import RequestReport, begun, current_report

# Request classes that may hold images and have a way of their own to the engine, where no field of
# ours is read.
UNREAD = {
    "GenerateRequest": "images arrive rendered here; give the budget to the endpoint that renders "
    "them",
    "ScoringRequestMixin": "scoring endpoints do not prune",
}


def install(model_alias: bool = False) -> None:
    """Hook vLLM's serving surfaces, once per process.

    Errors: ValueError if names with a budget are to be served and this vLLM does not let them.
    """
    wrap_renderer(before, after)
    wrap_pooling(before_body, after)
    wrap_foreign_bodies(note)
    if not wrap_model_check(split, accept) and model_alias:
        raise ValueError(
            "fsr.model_alias: this version of vLLM checks model names where plugin fsr cannot "
            "help it"
        )


split = model_alias.split_if_served


def note(model_config: ModelConfig, body: object) -> None:
    """Keep the fsr_* fields of a body whose request model drops them (Anthropic, Cohere)."""
    if not isinstance(body, Mapping):
        return
    report = begun()
    with as_request_errors(FieldError):
        _search(model_config, body, report)
        report.written = fields.written(
            body, body.get("mm_processor_kwargs"), body.get("vllm_xargs")
        )
        _refuse(model_config, min(report.written, default=None))


def accept(model_config: ModelConfig, request: HttpRequest, suffix: str | None) -> None:
    """After vLLM knows the model: judge what the request asks for, by whatever way."""
    report = begun()
    with as_request_errors(FieldError):
        if suffix is not None:
            report.alias = model_alias.budget(model_config, suffix)
        _search(model_config, request, report)
        asked = _asked(model_config, request, report)
        kinds = {kind.__name__ for kind in type(request).__mro__} & UNREAD.keys()
        if asked is not None and kinds:
            raise FieldError(
                report.name,
                f"{report.name}: no budget can be given on this endpoint: {UNREAD[kinds.pop()]}",
            )
    report.count()


def before(renderer: Renderer, request: HttpRequest) -> None:
    """Put what the request asks for where the processor reads it."""
    given = getattr(request, "mm_processor_kwargs", None)
    if request_of(given) is not None:
        return  # a next turn renders the same request again
    report = current_report.get() or RequestReport()
    with as_request_errors(FieldError):
        asked = _asked(renderer.model_config, request, report)
    report.count()  # where vLLM checked the model in a way that `accept` did not see
    if asked is None and misplaced.has_conversation(request):
        asked = NOTHING if refusal(renderer.model_config.hf_config) is None else None
    # mm_processor_kwargs is not a field of every request model; one that neither has it nor takes
    # more has no images to prune.
    if asked is not None and (hasattr(request, "mm_processor_kwargs") or _takes_more(request)):
        request.mm_processor_kwargs = with_request(given, asked)


def before_body(renderer: Renderer, request: HttpRequest) -> None:
    """`before` where the request model may drop fields: `model_extra` is the whole body here."""
    report = current_report.get() or RequestReport()
    with as_request_errors(FieldError):
        _search(renderer.model_config, request.model_extra, report)
    before(renderer, request)


def after(engine_inputs: EngineInputs) -> None:
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


def _takes_more(request: HttpRequest) -> bool:
    return bool(getattr(type(request), "model_config", {}).get("extra") == "allow")


def _search(model_config: ModelConfig, request: HttpRequest, report: RequestReport) -> None:
    """Refuse fields of ours in a wrong place or spelling; once, since content parts are read."""
    if report.searched:
        return
    report.searched = isinstance(request, Mapping) or _takes_more(request)
    found = misplaced.in_body(request, image_limit(model_config)) or report.wrong_header
    if found is not None:
        _refuse(model_config, found.field)
        raise found


def _refuse(model_config: ModelConfig, name: str | None) -> None:
    """FieldError for the field `name`, if there is one and this server cannot honour it."""
    reason = refusal(model_config.hf_config) if name is not None else None
    if name is not None and reason:
        raise FieldError(name, f"{name}: {reason}")


def _asked(
    model_config: ModelConfig, request: HttpRequest, report: RequestReport
) -> FsrRequest | None:
    """What the request asks for, in its body, its header and its model's name; None if nothing.

    It is parsed when first asked, and again only if there is more of the body to see by now.
    """
    values = fields.written(
        getattr(request, "model_extra", None),
        getattr(request, "mm_processor_kwargs", None),
        getattr(request, "vllm_xargs", None),
    )
    values = fields.merged(values, report.written)
    if report.asked is not None and values.keys() == report.written.keys():
        return report.asked
    if not values and report.header is None and report.alias is None:
        return None
    other = "model" if report.header is None else fields.BUDGET_HEADER
    report.written, report.name = values, min(values, default=other)
    _refuse(model_config, report.name)
    settings = read_settings(model_config.hf_config)
    assert settings is not None  # else it was refused
    if report.header is not None:
        values = fields.with_header(values, report.header, settings)
    values = {"fsr_budget": report.alias, **values}
    parsed = RequestFields.parse(values, settings, image_limit(model_config))
    report.asked = FsrRequest(parsed)
    return report.asked
