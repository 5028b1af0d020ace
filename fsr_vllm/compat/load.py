"""What the engines report of their load."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_load_readers: list[Callable[[int, int, int, float], None]] = []


def watch_load(read: Callable[[int, int, int, float], None]) -> None:
    """Call `read(engine, running, waiting, kv_usage)` with what each engine reports after its
    steps; last call counts.

    Why: StatLoggerManager.record is where every front end (HTTP, run-batch, Ray) gets its engines'
    scheduler figures. vLLM's stat-logger plugins see the same, but one that is installed turns
    statistics on in servers that do not use it. Read in 0.32; num_skipped_waiting_reqs is newer
    than the window. Can go when vLLM offers its load to plugins.
    """
    from vllm.v1.metrics.loggers import StatLoggerManager

    _load_readers[:] = [read]
    if getattr(StatLoggerManager, "_fsr_wrapped", False):
        return
    stock = StatLoggerManager.record

    @functools.wraps(stock)
    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        stats = kwargs.get("scheduler_stats", args[0] if args else None)
        if stats is None:
            return
        waiting = stats.num_waiting_reqs + getattr(stats, "num_skipped_waiting_reqs", 0)
        for reader in _load_readers:
            reader(
                kwargs.get("engine_idx") or 0, stats.num_running_reqs, waiting, stats.kv_cache_usage
            )

    StatLoggerManager.record = record
    StatLoggerManager._fsr_wrapped = True
