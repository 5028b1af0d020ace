"""A server whose plugin is installed and not active refuses requests with fields of ours.

They are told how to activate it. Nothing else of vLLM's HTTP side is touched.
"""

from __future__ import annotations

from collections.abc import Mapping

from fsr_vllm.compat.http import wrap_refusals
from fsr_vllm.compat.types import HttpRequest, ModelConfig
from fsr_vllm.server import requests


def install() -> None:
    """Hook vLLM's serving surfaces, once per process."""
    wrap_refusals(refuse)


def refuse(model_config: ModelConfig, request: HttpRequest | Mapping[str, object]) -> None:
    """Errors: as of `errors.request_error`, for a parsed request or a body that has our fields."""
    if isinstance(request, Mapping):
        requests.note(model_config, request)
    else:
        requests.accept(model_config, request, None)
