"""Routes under /v1/fsr, where an API key guards them like the rest of /v1."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from fsr_vllm.compat.front_end import ask_workers, engine_has_died, front_end
from fsr_vllm.server.gate import Unavailable, WorkerGate

router = APIRouter(tags=["fsr"])


def open_gate(engine_client: Any) -> WorkerGate:
    """The way to the workers of one API server's engine."""
    return WorkerGate(
        lambda method, args: ask_workers(engine_client, method, args),
        lambda: engine_has_died(engine_client),
    )


@router.get("/v1/fsr/methods")
async def list_methods() -> dict[str, Any]:
    """All registered methods with what they need, whether the question matters to them, and where
    they come from.
    """
    from fsr_vllm import methods

    return {
        "object": "list",
        "data": [{"id": name, **asdict(info)} for name, info in methods.list_methods().items()],
    }


@router.get("/v1/fsr/stats")
async def read_stats(request: Request) -> Any:
    """Counts of the API server that answers (there may be several) and of all workers;
    `fsr_vllm.stats` offline.

    `workers` is at most a second old, and None where the workers' extension is not ours.
    `worker_calls` counts what this server sent to its workers for routes like this one, and what it
    did not have to send or refused to.
    """
    _, processor = front_end(request.app)
    stats = getattr(processor, "fsr_stats", dict)
    gate = getattr(request.app.state, "fsr_gate", None)
    if gate is None:  # a server that only renders
        return {**stats(), "workers": None}
    try:
        workers = await gate.ask("fsr_stats")
    except Unavailable as error:
        return _unavailable(error)
    except Exception:  # another worker extension than ours, or the engine died meanwhile
        if gate.dead():
            return _unavailable(
                Unavailable("the engine has died; this server is about to stop", None)
            )
        workers = None
    return {**stats(), "worker_calls": dict(gate.counts), "workers": workers}


def _unavailable(error: Unavailable) -> JSONResponse:
    """503 in OpenAI's error shape, with Retry-After where coming again helps."""
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    body = {"message": str(error), "type": "ServiceUnavailableError", "param": None, "code": 503}
    return JSONResponse({"error": body}, status_code=503, headers=headers)
