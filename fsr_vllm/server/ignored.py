"""A server that leaves the plugin aside (`--fsr-ignore`): what requests say to us is dropped,
unread and unjudged.

Vanilla vLLM would refuse fields in mm_processor_kwargs, and model names with a budget behind them;
all else of ours it ignores by itself.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from fsr_vllm import __version__
from fsr_vllm.compat.http import wrap_model_check, wrap_pooling, wrap_renderer
from fsr_vllm.engine.inputs import without_fields
from fsr_vllm.params.misplaced import is_ours
from fsr_vllm.server.alias import MARK
from fsr_vllm.server.misplaced import CARRIERS

router = APIRouter(tags=["fsr"])


@router.get("/v1/fsr/config")
async def read_config() -> dict[str, Any]:
    """The same route as of a server that prunes (`server.config`)."""
    return {"object": "fsr.config", "version": __version__, "ignored": True, "prunes": False}


def install() -> None:
    """Hook vLLM's serving surfaces, once per process."""
    wrap_renderer(drop_fields, lambda engine_inputs: None)
    wrap_pooling(drop_fields, lambda engine_inputs: None)
    wrap_model_check(drop_suffix, lambda model_config, request, suffix: None)


def drop_fields(renderer: Any, request: Any) -> None:
    """Take our fields out of vLLM's own carriers; at the top level nobody reads them."""
    for name in CARRIERS:
        values = getattr(request, name, None)
        if isinstance(values, dict) and any(map(is_ours, values)):
            setattr(request, name, without_fields(values) or None)


def drop_suffix(model_config: Any, request: Any) -> None:
    """Take `@fsr...` off a model name that is not served as it stands."""
    if isinstance(request.model, str):
        base, mark, _ = request.model.rpartition(MARK)
        if mark and base:
            request.model = base
