"""Routes under /v1/fsr, where an API key guards them like the rest of /v1."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

router = APIRouter(tags=["fsr"])


@router.get("/v1/fsr/methods")
async def list_methods() -> dict[str, Any]:
    """All registered methods with what they need, whether the question matters to them, and where they come from."""
    from fsr_vllm.methods import methods

    return {"object": "list", "data": [{"id": name, **asdict(info)} for name, info in methods().items()]}
