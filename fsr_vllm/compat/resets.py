"""vLLM's resets of its caches, which reach neither a model nor a processor."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable

from fsr_vllm.compat.patching import Patch
from fsr_vllm.compat.types import Anything, Function, Processor, Renderer

_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
CLEAR_MM_CACHE = Patch(
    "vllm.renderers.base:BaseRenderer.clear_mm_cache",
    "/reset_mm_cache, sleep and pause end here in the front end, whichever processor cache is in "
    "use, none included. A renderer binds the method when it is made, so it is replaced before.",
    "a processor is told of resets",
    signature="(self)",
    missing="older releases, which have it elsewhere",
)
RUNNER_RESETS = tuple(
    Patch(
        f"{module}:GPUModelRunner.{name}",
        "vLLM's resets, sleep, pause and reload_weights end here in a worker, and none reaches the "
        "model. Replaced on the classes of both runners, of which one is imported by then.",
        "a model is told of resets",
        signature="(self)",
        missing="releases without this runner",
    )
    for module in _RUNNERS
    for name in ("reset_encoder_cache", "reset_mm_cache")
)


_forget: weakref.WeakSet[Anything] = weakref.WeakSet()


def wrap_mm_cache_reset(clear: Callable[[Processor], None]) -> None:
    """Call `clear(processor)` whenever a front end clears its multimodal cache."""

    def make(stock: Function) -> Function:
        def clear_mm_cache(self: Renderer) -> Anything:
            result = stock(self)
            clear(getattr(self, "mm_processor", None))
            return result

        return clear_mm_cache

    CLEAR_MM_CACHE.apply(make)


def on_runner_reset(model: Anything) -> None:
    """Call `model.fsr_forget()` whenever this worker's runner drops encoder outputs or caches."""
    _forget.add(model)
    for patch in RUNNER_RESETS:
        if patch.target.partition(":")[0] in sys.modules:
            patch.apply(_and_forget)


def _and_forget(stock: Function) -> Function:
    def reset(self: Anything, *args: Anything, **kwargs: Anything) -> Anything:
        result = stock(self, *args, **kwargs)
        for model in list(_forget):
            model.fsr_forget()
        return result

    return reset
