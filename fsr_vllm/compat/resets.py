"""vLLM's resets of its caches, which reach neither a model nor a processor."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")


_forget: weakref.WeakSet[Any] = weakref.WeakSet()


def wrap_mm_cache_reset(clear: Callable[[Any], None]) -> None:
    """Call `clear(processor)` whenever a front end clears its multimodal cache; safe to call twice.

    Why: `BaseRenderer.clear_mm_cache` is where /reset_mm_cache, sleep and pause end in the front
    end, whichever processor cache is in use, none included. To be called before a renderer is made,
    which binds the method. Run in 0.32; where the method does not exist (it was elsewhere in older
    versions) nothing is wrapped. Can go when a processor is told of resets.
    """
    from vllm.renderers import base

    cls = base.BaseRenderer
    stock = getattr(cls, "clear_mm_cache", None)
    if stock is None or getattr(cls, "_fsr_resets", False):
        return

    @functools.wraps(stock)
    def clear_mm_cache(self: Any) -> Any:
        result = stock(self)
        clear(getattr(self, "mm_processor", None))
        return result

    cls.clear_mm_cache = clear_mm_cache
    cls._fsr_resets = True


def on_runner_reset(model: Any) -> None:
    """Have `model.fsr_forget()` called whenever this worker's runner drops encoder outputs or
    multimodal caches.

    Why: `reset_encoder_cache` and `reset_mm_cache` of the model runner are where vLLM's resets,
    sleep, pause and reload_weights end in a worker, and none reaches the model. Wrapped on the
    classes of both runners, of which one is already imported when a model is made. Run in 0.32. Can
    go when a model is told of resets.
    """
    _forget.add(model)
    for module in _RUNNERS:
        cls = getattr(sys.modules.get(module), "GPUModelRunner", None)
        if cls is None or getattr(cls, "_fsr_resets", False):
            continue
        for name in ("reset_encoder_cache", "reset_mm_cache"):
            setattr(cls, name, _and_forget(getattr(cls, name)))
        cls._fsr_resets = True


def _and_forget(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def reset(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, *args, **kwargs)
        for model in list(_forget):
            model.fsr_forget()
        return result

    return reset
