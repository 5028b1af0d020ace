"""What the engines report of their load."""

from __future__ import annotations

from collections.abc import Callable

from fsr_vllm.compat.patching import Patch
from fsr_vllm.compat.types import Anything, Function

RECORD = Patch(
    "vllm.v1.metrics.loggers:StatLoggerManager.record",
    "Every front end (HTTP, run-batch, Ray) gets its engines' scheduler figures here. Stat-logger "
    "plugins see the same, but one that is installed turns statistics on in servers that do not "
    "use it.",
    "vLLM offers its load to plugins",
    signature="(self, scheduler_stats, *engine_idx)",
)


def watch_load(read: Callable[[int, int, int, float], None]) -> None:
    """Call read(engine, running, waiting, kv_usage) after each step of an engine."""

    def make(stock: Function) -> Function:
        def record(self: Anything, *args: Anything, **kwargs: Anything) -> None:
            stock(self, *args, **kwargs)
            stats = kwargs.get("scheduler_stats", args[0] if args else None)
            if stats is not None:
                # Skipped requests are newer than the window.
                waiting = stats.num_waiting_reqs + getattr(stats, "num_skipped_waiting_reqs", 0)
                engine = kwargs.get("engine_idx") or 0
                read(engine, stats.num_running_reqs, waiting, stats.kv_cache_usage)

        return record

    RECORD.apply(make)
