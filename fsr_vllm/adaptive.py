"""The default budget under load: a range, a few levels in it, and the rule that moves between them.

Nothing here knows HTTP or vLLM. `AdaptiveBudget` is deterministic: the same readings at the same
times give the same budgets. `LoadMonitor` holds one for a process, with what that process knows of
the load.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Few, so that an image seen again under load often finds its cached rows: at each level it has an
# entry of its own.
LEVELS = 4
# An older reading says nothing about queues any more: of several API servers only one gets each
# reading.
STALE_SECONDS = 10.0


def budget_levels(low: int, high: int, count: int = LEVELS) -> tuple[int, ...]:
    """At most `count` budgets from `high` to `low`, each about the same share of the one before."""
    between = (round(high * (low / high) ** (step / (count - 1))) for step in range(1, count - 1))
    return tuple(sorted({high, *between, low}, reverse=True))


@dataclass(frozen=True)
class Load:
    """Requests that run and that wait, and the share of KV cache blocks that running ones hold."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0


@dataclass(frozen=True)
class Rule:
    """When to move between levels; the values were chosen by simulation (docs/adaptive.md).

    Pressure i is `queue[i]` waiting requests per running one, or `kv[i]` of the KV cache in use,
    whichever is more; between these points it is linear. Level i is entered at pressure i and left,
    one level at a time, when pressure has been below i - `margin` for `hold_seconds`. Pressure is
    smoothed over `smooth_seconds`. `spare` is added to the running requests: on a server that
    hardly does anything, two requests that just came are no queue.
    """

    queue: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    kv: tuple[float, ...] = (0.70, 0.80, 0.88, 0.95, 1.0)
    spare: float = 12.0
    margin: float = 0.5
    smooth_seconds: float = 1.0
    hold_seconds: float = 20.0

    def pressure(self, load: Load) -> float:
        """From 0 to the number of points less one.

        It never falls when more requests wait or more cache is in use.
        """
        waiting = load.waiting / (load.running + self.spare)
        return max(_position(waiting, self.queue), _position(load.kv_usage, self.kv))


def _position(value: float, points: Sequence[float]) -> float:
    """Where `value` lies among ascending points: 2.5 is half-way from points[2] to points[3]."""
    for index, (lower, upper) in enumerate(zip(points, points[1:], strict=False)):
        if value < upper:
            return index + max(0.0, (value - lower) / (upper - lower))
    return len(points) - 1.0


class AdaptiveBudget:
    """The budget of requests that name none: HIGH at rest, less under load at once, more slowly."""

    def __init__(self, low: int, high: int, rule: Rule | None = None) -> None:
        """A budget at rest, which is `high`."""
        self.levels = budget_levels(low, high)
        self.rule = rule or Rule()
        self.level = 0
        self.smoothed = 0.0
        self._pressure = 0.0
        self._time = -math.inf
        self._calm_since = -math.inf

    @property
    def budget(self) -> int:
        """The budget that follows from all that was read so far."""
        return self.levels[self.level]

    def update(self, load: Load, now: float) -> int:
        """The budget from `now` on (seconds, never going back), given the load just read."""
        now = max(now, self._time)
        # What was read last held until now: a first-order filter, which keeps order, so more load
        # never means more tokens. Rising and falling alike wait for it; a blip of a step or two
        # changes nothing.
        share = (
            -math.expm1((self._time - now) / self.rule.smooth_seconds)
            if self._time > -math.inf
            else 0.0
        )
        self.smoothed += (self._pressure - self.smoothed) * share
        self._pressure, self._time = self.rule.pressure(load), now
        deeper = min(int(self.smoothed), len(self.levels) - 1)
        if deeper > self.level:
            self.level, self._calm_since = deeper, now
        while self.level and self.smoothed < self.level - self.rule.margin:
            if now - self._calm_since < self.rule.hold_seconds:
                return self.budget
            self.level -= 1
            self._calm_since += self.rule.hold_seconds
        self._calm_since = now
        return self.budget


class LoadMonitor:
    """What one process knows of its engines' load, and the budget that follows from it.

    Safe to use from threads.
    """

    def __init__(
        self,
        low: int,
        high: int,
        rule: Rule | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """No load is known yet; `changed` is called with the budgets before and after a change."""
        self.policy = AdaptiveBudget(low, high, rule)
        self.changed: Callable[[int, int], None] = lambda before, after: None
        self._clock = clock
        self._lock = threading.Lock()
        self._readings: dict[int, tuple[float, Load]] = {}
        self._here = 0

    def read(self, engine: int, load: Load) -> None:
        """An engine's own figures, as they come after its steps."""
        with self._lock:
            self._readings[engine] = (self._clock(), load)
            self._update()

    def enter(self) -> None:
        """A request came to this process."""
        with self._lock:
            self._here += 1

    def leave(self) -> None:
        """It was answered, or went away."""
        with self._lock:
            self._here -= 1
            self._update()

    def budget(self) -> int:
        """The budget for a request that names none, now."""
        with self._lock:
            return self._update()

    def load(self) -> Load:
        """The engines' figures together; a request that came here and does not run yet waits."""
        now = self._clock()
        fresh = [load for read, load in self._readings.values() if now - read <= STALE_SECONDS]
        running = sum(load.running for _, load in self._readings.values())
        # The engines' count is behind by a step, and knows nothing of what this process is still
        # preparing.
        waiting = max(sum(load.waiting for load in fresh), self._here - running, 0)
        return Load(running, waiting, max((load.kv_usage for load in fresh), default=0.0))

    def _update(self) -> int:
        before = self.policy.budget
        after = self.policy.update(self.load(), self._clock())
        if after != before:
            self.changed(before, after)
        return after


_active: LoadMonitor | None = None


def start(low: int, high: int) -> Callable[[int, int, int, float], None]:
    """Follow the load in this process from now on; returns what takes the engines' figures."""
    global _active
    if _active is None or (_active.policy.levels[-1], _active.policy.levels[0]) != (low, high):
        _active = LoadMonitor(low, high)
    monitor = _active
    return lambda engine, running, waiting, kv_usage: monitor.read(
        engine, Load(running, waiting, kv_usage)
    )


def active() -> LoadMonitor | None:
    """The monitor of this process; None while its default budget is fixed."""
    return _active


def default_budget(bounds: tuple[int, int] | None) -> int | None:
    """The budget now for a request that names none, within `bounds`; None without: it is fixed."""
    if bounds is None:
        return None
    # A process that serves nothing, such as the engine's, makes its inputs for profiling.
    return bounds[1] if _active is None else _active.budget()
