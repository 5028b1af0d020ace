"""What an API server holds: its model config, its processor and the way to its workers."""

from __future__ import annotations

import asyncio

from fsr_vllm.compat.patching import Entry
from fsr_vllm.compat.types import Anything, App, EngineClient, ModelConfig, Processor

MM_PROCESSOR = Entry(
    "vllm.renderers.base:BaseRenderer.get_mm_processor",
    "The multimodal processor of an offline LLM's own process.",
    "vLLM hands it to plugins",
    signature="(self)",
)
ERRORED = Entry(
    "vllm.v1.engine.async_llm:AsyncLLM.errored",
    "A call that is sent to a dead engine is waited for without end, and keeps the process from "
    "exiting; vLLM's own /health and watchdog read this.",
    "such calls fail",
)
ALL_ENGINES = Entry(
    "vllm.v1.engine.core_client:AsyncMPClient._call_utility_async",
    "`collective_rpc` asks all data-parallel engines and returns the first one's answer alone.",
    "it returns all answers",
    signature="async (self, method, *args, engine)",
    read="0.27, 0.30, 0.32",
)


def front_end_processor(llm: Anything) -> Processor:
    """The multimodal processor inside an offline `LLM`'s own process."""
    return llm.llm_engine.renderer.get_mm_processor()


def front_end(app: App) -> tuple[ModelConfig, Processor]:
    """The model config of an API server and its multimodal processor, None where the model has
    none. A server that only renders has no `engine_client`, but an `online_renderer`.
    """
    client = getattr(app.state, "engine_client", None)
    renderer = client.renderer if client is not None else app.state.online_renderer.renderer
    return renderer.model_config, getattr(renderer, "mm_processor", None)


def engine_has_died(client: EngineClient) -> bool:
    """Whether nothing that is sent to the engine will be answered any more."""
    return bool(client.errored)


async def ask_workers(
    client: EngineClient, method: str, args: tuple[object, ...] = ()
) -> list[Anything]:
    """A method of every worker of every data-parallel engine."""
    core = client.engine_core
    engines = getattr(core, "core_engines", None) or []
    if len(engines) < 2:
        return await client.collective_rpc(method, args=args)
    calls = (
        core._call_utility_async("collective_rpc", method, None, args, None, engine=each)
        for each in engines
    )
    return [worker for workers in await asyncio.gather(*calls) for worker in workers]


def image_limit(model_config: ModelConfig) -> int:
    """How many images vLLM takes in one prompt."""
    multimodal = getattr(model_config, "multimodal_config", None)
    return 0 if multimodal is None else int(multimodal.get_limit_per_prompt("image"))
