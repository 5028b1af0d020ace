"""One server under load, as a discrete-event simulation: arrivals, a front end, and an engine with
continuous batching.

The budget of each request is the policy's own (`fsr_vllm.adaptive.LoadMonitor`, on simulated time)
or a fixed number.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from fsr_vllm.adaptive import Load, LoadMonitor, Rule


@dataclass(frozen=True)
class Times:
    """Seconds: what a request costs the front end, and what steps of the engine cost."""

    prepare: float
    step: float
    encode: float
    prefill_per_token: float
    decode_step: float
    decode_per_sequence: float

    def faster(self, factor: float) -> Times:
        return Times(**{name: seconds / factor for name, seconds in vars(self).items()})


@dataclass(frozen=True)
class Setup:
    """The server, and what requests look like."""

    times: Times
    text_tokens: int = 32
    output_tokens: int = 16
    step_tokens: int = 2048
    sequences: int = 64
    kv_tokens: int = 16384


@dataclass
class Request:
    arrived: float
    budget: int = 0
    to_prefill: int = 0
    to_decode: int = 0
    held: int = 0
    first_token: float = 0.0
    done: float = 0.0


@dataclass
class Outcome:
    """What became of all requests, and of the budget: (time, budget) of every change."""

    requests: list[Request]
    changes: list[tuple[float, int]] = field(default_factory=list)


def poisson(rates: Sequence[tuple[float, float]], seed: int) -> list[float]:
    """Arrival times for stretches of (seconds, requests per second)."""
    draw, start, found = random.Random(seed), 0.0, []
    for seconds, rate in rates:
        now = start + draw.expovariate(rate)
        while now < start + seconds:
            found.append(now)
            now += draw.expovariate(rate)
        start += seconds
    return found


def simulate(
    arrivals: Sequence[float], setup: Setup, bounds: tuple[int, int], rule: Rule | None = None
) -> Outcome:
    """Serve all arrivals; a range whose ends are equal is a fixed budget."""
    clock = [0.0]
    monitor = LoadMonitor(*bounds, rule, clock=lambda: clock[0])
    outcome = Outcome([Request(time) for time in arrivals])
    monitor.changed = lambda before, after: outcome.changes.append((clock[0], after))
    coming, preparing = deque(outcome.requests), deque[Request]()
    waiting, running = deque[Request](), list[Request]()
    times, held = setup.times, 0
    prepared_at = step_ends = float("inf")
    batch: list[tuple[Request, int]] = []
    while coming or preparing or waiting or running:
        arrives = coming[0].arrived if coming else float("inf")
        clock[0] = now = min(arrives, prepared_at, step_ends)
        if now == step_ends:
            step_ends = float("inf")
            for request, tokens in batch:
                if request.to_prefill:
                    request.to_prefill -= tokens
                    request.first_token = now if not request.to_prefill else 0.0
                else:
                    request.to_decode -= 1
                if not request.to_prefill and not request.to_decode:
                    request.done, held = now, held - request.held
                    running.remove(request)
                    monitor.leave()
            monitor.read(0, Load(len(running), len(waiting), held / setup.kv_tokens))
        elif now == prepared_at:
            prepared_at = float("inf")
            waiting.append(preparing.popleft())
        else:
            preparing.append(coming.popleft())
            monitor.enter()
        if preparing and prepared_at == float("inf"):
            _plan(preparing[0], monitor.budget(), setup)
            prepared_at = now + times.prepare
        if step_ends == float("inf") and (waiting or running):
            batch, seconds, held = _step(waiting, running, setup, held)
            step_ends = now + seconds
    return outcome


def _plan(request: Request, budget: int, setup: Setup) -> None:
    request.budget = budget
    request.to_prefill = budget + setup.text_tokens
    request.to_decode = setup.output_tokens - 1
    request.held = request.to_prefill + setup.output_tokens


def _step(
    waiting: deque[Request], running: list[Request], setup: Setup, held: int
) -> tuple[list[tuple[Request, int]], float, int]:
    """What the engine runs next, how long that takes, and the KV tokens then held: decoding first,
    then prefill.
    """
    times, left = setup.times, setup.step_tokens
    batch = [(request, 1) for request in running if not request.to_prefill]
    left -= len(batch)
    seconds = times.decode_step + times.decode_per_sequence * len(batch) if batch else times.step
    for request in running:
        if request.to_prefill and left > 0:
            batch.append((request, min(left, request.to_prefill)))
            left -= batch[-1][1]
    while waiting and left > 0 and len(running) < setup.sequences:
        request = waiting[0]
        if held + request.held > setup.kv_tokens:
            break
        held += request.held
        running.append(waiting.popleft())
        batch.append((request, min(left, request.to_prefill)))
        left -= batch[-1][1]
        seconds += times.encode
    seconds += times.prefill_per_token * sum(
        tokens for request, tokens in batch if request.to_prefill
    )
    return batch, seconds, held
