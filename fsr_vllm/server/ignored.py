"""A server that leaves the plugin aside (`--fsr-ignore`) drops what requests say to us, unread.

Vanilla vLLM would refuse fields in mm_processor_kwargs, and model names with a budget behind them;
all else of ours it ignores by itself.
"""

from __future__ import annotations

from fsr_vllm.compat.http import wrap_model_check, wrap_pooling, wrap_renderer
from fsr_vllm.compat.types import HttpRequest, ModelConfig, Renderer
from fsr_vllm.params import without_fields
from fsr_vllm.params.misplaced import is_ours
from fsr_vllm.server import model_alias
from fsr_vllm.server.misplaced import CARRIERS


def install() -> None:
    """Hook vLLM's serving surfaces, once per process."""
    wrap_renderer(drop_fields, lambda engine_inputs: None)
    wrap_pooling(drop_fields, lambda engine_inputs: None)
    wrap_model_check(drop_suffix, lambda model_config, request, suffix: None)


def drop_fields(renderer: Renderer, request: HttpRequest) -> None:
    """Take our fields out of vLLM's own carriers; at the top level nobody reads them."""
    for name in CARRIERS:
        values = getattr(request, name, None)
        if isinstance(values, dict) and any(map(is_ours, values)):
            setattr(request, name, without_fields(values) or None)


def drop_suffix(model_config: ModelConfig, request: HttpRequest) -> None:
    """Take `@fsr...` off a model name that is not served as it stands."""
    model_alias.split(request)
