"""A request on its way through the hooks of the HTTP side, on plain objects, without a server."""

import contextlib
from types import SimpleNamespace

from fsr_vllm.engine.conversation import settled
from fsr_vllm.params import NOTHING, SETTINGS_KEY, ServerSettings, request_of
from fsr_vllm.server import model_alias, requests
from fsr_vllm.server.report import RequestReport, current_report

LIMIT = 999  # images in a prompt
IMAGE = {"type": "image_url", "image_url": {"url": "u"}}
MESSAGES = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]}]


class Request(SimpleNamespace):
    """A parsed request of a model that keeps unknown fields, as most of vLLM's do."""

    model_config = {"extra": "allow"}


class GenerateRequest(Request):
    """By the name of vLLM's request class that carries rendered images."""


def configured(settings=None, unsupported=None):
    """A model config; without settings the plugin is not active."""
    config = SimpleNamespace()
    if settings is not None:
        found = {**settings, "unsupported": unsupported}
        setattr(config, SETTINGS_KEY, ServerSettings(**found).model_dump_json())
    limits = SimpleNamespace(get_limit_per_prompt=lambda modality: LIMIT)
    return SimpleNamespace(hf_config=config, multimodal_config=limits)


def parsed(kind=Request, messages=MESSAGES, mm_processor_kwargs=None, xargs=None, **extra):
    """A chat request; what is no field of vLLM's is in `model_extra`."""
    return kind(
        model=extra.pop("model", "m"),
        messages=messages,
        model_extra=extra,
        mm_processor_kwargs=mm_processor_kwargs,
        vllm_xargs=xargs,
    )


@contextlib.contextmanager
def reported(**known):
    """The report of one HTTP request, as the middleware opens it."""
    report = RequestReport(by_middleware=True, **known)
    token = current_report.set(report)
    try:
        yield report
    finally:
        current_report.reset(token)


def hooked(model_config, request):
    """mm_processor_kwargs after the model was checked and the renderer was called, twice."""
    suffix = model_alias.split_if_served(model_config, request)
    requests.accept(model_config, request, suffix)
    requests.before(SimpleNamespace(model_config=model_config), request)
    once = request.mm_processor_kwargs
    # A next turn renders the same request again.
    requests.before(SimpleNamespace(model_config=model_config), request)
    assert request.mm_processor_kwargs is once
    return once


def after(settings=None, unsupported=None, header=None, **said):
    """What a processor is given for a request: after the hooks and its conversation."""
    model_config, request = configured(settings, unsupported), parsed(**said)
    with reported(header=header):
        given = hooked(model_config, request)
    (once,) = settled(model_config, [request.messages], given)
    return once


def asked(settings=None, **said):
    """The fields that a request was found to ask for; empty if none."""
    with reported(header=said.pop("header", None)):
        found = request_of(hooked(configured(settings), parsed(**said))) or NOTHING
    return found.fields.model_dump(exclude_none=True)
