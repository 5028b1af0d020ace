"""Routes under /v1/fsr, where an API key guards them like the rest of /v1."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from fsr_vllm import compat_caches

router = APIRouter(tags=["fsr"])


@router.get("/v1/fsr/methods")
async def list_methods() -> dict[str, Any]:
    """All registered methods with what they need, whether the question matters to them, and where they come from."""
    from fsr_vllm.methods import methods

    return {"object": "list", "data": [{"id": name, **asdict(info)} for name, info in methods().items()]}


@router.get("/v1/fsr/stats")
async def read_stats(request: Request) -> dict[str, Any]:
    """Counts of the API server that answers (there may be several) and of all workers; `fsr_vllm.stats` offline."""
    return await compat_caches.engine_stats(request.app)
