"""What is counted and timed: in a worker, and for users of an offline `LLM`."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from fsr_vllm.compat.front_end import front_end_processor
from fsr_vllm.compat.types import OfflineLLM


def stats(llm: OfflineLLM) -> dict[str, Any]:
    """Visual tokens kept and total of an offline `LLM` so far, and its workers' statistics.

    Keys: images, pruned_images, visual_tokens_kept, visual_tokens_total (as requested, caches
    included), preprocessed_images and the pixel cache's pixel_* of this process, and `workers`, one
    dict per worker with what was computed (see `FsrWorkerExtension.fsr_stats`).
    Errors: ValueError if the plugin is not active in this `LLM`.
    """
    processor = front_end_processor(llm)
    if getattr(processor, "fsr_settings", None) is None:
        raise ValueError('plugin fsr is not active in this LLM; pass additional_config={"fsr": {}}')
    return {**processor.fsr_stats(), "workers": llm.collective_rpc("fsr_stats")}


class Counts:
    """Numbers that only grow; those on the device stay there until somebody asks."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = defaultdict(int)

    def add(self, **values: int | torch.Tensor) -> None:
        """Add to the numbers of these names."""
        for name, value in values.items():
            self._values[name] = self._values[name] + value

    def read(self) -> dict[str, float]:
        """All of them; waits for the device."""
        return {
            name: float(value) if isinstance(value, torch.Tensor) else value
            for name, value in self._values.items()
        }


class Clock:
    """Seconds in named parts: wall time on the CPU, CUDA events that are read when asked."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add what happens inside to the seconds of `part`."""
        if not torch.cuda.is_available():
            started = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - started
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((part, first, last))
        if len(self._events) > 1000 and self._events[0][2].query():
            self._settle(self._events.pop(0))

    def _settle(self, entry: tuple[str, Any, Any]) -> None:
        part, first, last = entry
        self._seconds[part] += first.elapsed_time(last) / 1000

    def read(self) -> dict[str, float]:
        """Seconds by part so far; waits for the device."""
        while self._events:
            self._events[0][2].synchronize()
            self._settle(self._events.pop(0))
        return dict(self._seconds)
