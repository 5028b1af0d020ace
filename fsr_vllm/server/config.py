"""GET /v1/fsr/config: what this server allows and does by default, as its API server knows it."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from fsr_vllm import __version__
from fsr_vllm.compat.front_end import front_end
from fsr_vllm.compat.types import ModelConfig, Processor
from fsr_vllm.params import build_method, read_settings, resolve_budget

router = APIRouter(tags=["fsr"])
ignored_router = APIRouter(tags=["fsr"])


@ignored_router.get("/v1/fsr/config")
async def read_ignored() -> dict[str, Any]:
    """The answer of a server that leaves the plugin aside."""
    return {"object": "fsr.config", "version": __version__, "ignored": True, "prunes": False}


@router.get("/v1/fsr/config")
async def read_config(request: Request) -> dict[str, Any]:
    """Bounds, defaults, method and text encoder of this server; the same for every client.

    No worker is asked.
    """
    model_config, processor = front_end(request.app)
    return described(model_config, processor)


def described(model_config: ModelConfig, processor: Processor) -> dict[str, Any]:
    """The answer for a model config and the processor of its front end, which may be vLLM's."""
    settings = read_settings(model_config.hf_config)
    methods: list[str] = []
    if settings is not None and settings.unsupported is None:
        methods = getattr(processor, "fsr_methods", list)()
    answer: dict[str, Any] = {
        "object": "fsr.config",
        "version": __version__,
        "ignored": False,
        "prunes": bool(methods),
    }
    if settings is None:
        return answer
    total, low_high = settings.tokens_per_image, settings.adaptive_range
    default = settings.default_budget
    return {
        **answer,
        "min_budget": settings.min_budget or 1,
        "max_budget": settings.max_budget,
        "default_budget": default,
        "default_tokens": None if total is None else resolve_budget(default, total),
        "adaptive": None if low_high is None else {"low": low_high[0], "high": low_high[1]},
        "detail_budgets": settings.detail_budgets,
        "tokens_per_image": total,  # of the largest image, where they are not of one size
        "one_size": settings.one_size,
        "method": settings.method,
        "options": asdict(build_method(settings.method, None)),
        "methods": methods,
        "text_encoder": _named(settings.text_encoder),
        "model_alias": settings.model_alias,
        "encoder_limit": settings.encoder_limit,
    }


def _named(encoder: str) -> str:
    """An encoder's name; of a folder on the server's disk only its last part."""
    return os.path.basename(os.path.normpath(encoder)) if os.path.isdir(encoder) else encoder
