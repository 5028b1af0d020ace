"""What an API server holds: its model config, its processor and the way to its workers."""

from __future__ import annotations

import asyncio
from typing import Any


def front_end_processor(llm: Any) -> Any:
    """The multimodal processor inside an offline `LLM`'s own process."""
    return llm.llm_engine.renderer.get_mm_processor()


def front_end(app: Any) -> tuple[Any, Any]:
    """The model config of an API server and its multimodal processor, None where the model has
    none.

    Why: the app's `state` holds what its routes work with; a server that only renders has no
    `engine_client`, but an `online_renderer`. Read and run in 0.32. Can go when vLLM hands both to
    endpoint plugins.
    """
    client = getattr(app.state, "engine_client", None)
    renderer = client.renderer if client is not None else app.state.online_renderer.renderer
    return renderer.model_config, getattr(renderer, "mm_processor", None)


def engine_has_died(client: Any) -> bool:
    """Whether nothing that is sent to the engine will be answered any more.

    Why: a call that is sent to a dead engine is waited for without end, and keeps the process from
    exiting. `errored` is what vLLM's own /health and watchdog read. Run in 0.32. Can go when such
    calls fail.
    """
    return bool(client.errored)


async def ask_workers(client: Any, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
    """A method of every worker of every data-parallel engine.

    Why: `collective_rpc` asks all engines and returns the first one's answer alone. The client's
    `core_engines` and `_call_utility_async` were read in 0.27, 0.30 and 0.32, run in 0.32. Can go
    when it returns all answers.
    """
    core = client.engine_core
    engines = getattr(core, "core_engines", None) or []
    if len(engines) < 2:
        return await client.collective_rpc(method, args=args)
    calls = (
        core._call_utility_async("collective_rpc", method, None, args, None, engine=each)
        for each in engines
    )
    return [worker for workers in await asyncio.gather(*calls) for worker in workers]


def image_limit(model_config: Any) -> int:
    """How many images vLLM takes in one prompt; more are refused unread. Attribute and method in
    0.26-0.33.
    """
    multimodal = getattr(model_config, "multimodal_config", None)
    return 0 if multimodal is None else int(multimodal.get_limit_per_prompt("image"))
