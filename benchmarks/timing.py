"""Medians of repeated runs, on the CPU's clock or by the GPU's events, within a time limit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the shortest, the quartiles, and of how many runs."""

    least: float
    low: float
    median: float
    high: float
    runs: int

    def per(self, count: int) -> Timing:
        """The same for one of `count` images."""
        return Timing(
            self.least / count, self.low / count, self.median / count, self.high / count, self.runs
        )


def once(call: Call, device: str) -> float:
    """Milliseconds of one call. On a GPU from the first to the last of its work there, waits for
    the host included.
    """
    if device != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def measure(calls: dict[str, Call], device: str, repeats: int, seconds: float) -> dict[str, Timing]:
    """Run all calls in turn, again and again, so that what slows the machine meets each of them;
    medians per call.

    Each has up to `repeats` runs after warming up, fewer if they would take longer than `seconds`,
    never fewer than 3: where time is short the warm-up, which matters little to long calls, is the
    first of these.
    """
    first = {name: _warm(call, device) for name, call in calls.items()}
    possible = int((seconds * 1e3 - sum(first.values())) / max(1e-6, sum(first.values())))
    runs = {name: [time_taken] if possible < 3 else [] for name, time_taken in first.items()}
    for _ in range(min(max(2, repeats), max(2, possible))):
        for name, call in calls.items():
            runs[name].append(once(call, device))
    return {name: _summary(values) for name, values in runs.items()}


def _warm(call: Call, device: str) -> float:
    """Milliseconds of the first call that is no longer cold: compilers and allocators have been at
    work before.
    """
    taken = once(call, device)
    if device == "cuda":
        once(call, device)
    return once(call, device) if device == "cuda" or taken < 200 else taken


def _summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(min(values), low, median, high, len(values))
