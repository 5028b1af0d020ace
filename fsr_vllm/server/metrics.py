"""The default budget that follows the load, on vLLM's own /metrics."""

from __future__ import annotations

import functools

from prometheus_client import Counter, Gauge

from fsr_vllm.adaptive import LoadMonitor


@functools.cache
def _metrics() -> tuple[Gauge, Counter]:
    # Made in the process that serves: with several API servers, values go into files of that
    # process.
    gauge = Gauge(
        "fsr_adaptive_budget",
        "Visual tokens per image that requests without a budget get now (several API servers: "
        "the least of them).",
        multiprocess_mode="livemin",
    )
    counter = Counter(
        "fsr_adaptive_changes",
        "Changes of the budget that requests without one get, by direction.",
        labelnames=["direction"],
    )
    return gauge, counter


def publish(monitor: LoadMonitor) -> None:
    """Show the monitor's budget now and at every change."""
    gauge, counter = _metrics()
    for direction in ("down", "up"):
        counter.labels(direction)  # present with 0 before the first change
    gauge.set(monitor.budget())

    def changed(before: int, after: int) -> None:
        gauge.set(after)
        counter.labels("down" if after < before else "up").inc()

    monitor.changed = changed
