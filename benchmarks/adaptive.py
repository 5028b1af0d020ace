"""Fixed and adaptive default budgets in a simulated server, at several loads and in a burst.

    python -m benchmarks.adaptive            # about a minute on one core

Service times are the measured ones of results/service-times-cpu.json (see benchmarks.servicetimes),
and the same divided by 50, as on a faster machine: a rule that needs the right seconds would show
there. Loads are multiples of the rate that the server reaches at HIGH with requests always waiting.
Writes adaptive-simulation.json and .md into --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from fsr_vllm.adaptive import Rule

from .queueing import Outcome, Setup, Times, poisson, simulate
from .records import write_json

RESULTS = Path(__file__).parent / "results"
SEEDS = (1, 2, 3)
FASTER = 50.0
SECONDS = 240.0
# A first token within this many times what an idle server at HIGH takes counts for goodput.
PATIENCE = 8.0
# name: stretches of (seconds, multiple of the capacity at HIGH)
LOADS: dict[str, tuple[tuple[float, float], ...]] = {
    "0.5x": ((SECONDS, 0.5),),
    "1x": ((SECONDS, 1.0),),
    "3x": ((SECONDS, 3.0),),
    "burst": ((80.0, 0.3), (20.0, 3.0), (140.0, 0.3)),
}
# Beside the rule in force: what each of its parts is for.
RULES = {
    "in force": Rule(),
    "no hysteresis": Rule(margin=0.0, hold_seconds=0.0),
    "no hold": Rule(hold_seconds=0.0),
    "hold 5 s": Rule(hold_seconds=5.0),
    "hold 60 s": Rule(hold_seconds=60.0),
    "no smoothing": Rule(smooth_seconds=1e-6),
    "smoothing 5 s": Rule(smooth_seconds=5.0),
    "half the queue": Rule(queue=tuple(0.5 * point for point in Rule().queue)),
    "twice the queue": Rule(queue=tuple(2.0 * point for point in Rule().queue)),
    "spare 4": Rule(spare=4.0),
    "spare 24": Rule(spare=24.0),
}


def capacity(setup: Setup, budget: int, requests: int = 300) -> float:
    """Requests per second with all of them waiting from the start."""
    done = [
        request.done for request in simulate([0.0] * requests, setup, (budget, budget)).requests
    ]
    return requests / max(done)


def figures(outcome: Outcome, seconds: float, limit: float, high: int) -> dict[str, float]:
    """TTFT in seconds, goodput in requests per second of the arrivals' time, and what happened to
    the budget.
    """
    waits = sorted(request.first_token - request.arrived for request in outcome.requests)
    budgets = [request.budget for request in outcome.requests]
    switches = sum(1 for a, b in zip(budgets, budgets[1:], strict=False) if a != b)
    return {
        "ttft_p50": waits[len(waits) // 2],
        "ttft_p95": waits[int(0.95 * (len(waits) - 1))],
        "goodput": sum(wait <= limit for wait in waits) / seconds,
        "mean_budget": statistics.fmean(budgets),
        "at_high": sum(budget == high for budget in budgets) / len(budgets),
        "changes_per_minute": 60.0 * len(outcome.changes) / seconds,
        "switches_per_100_requests": 100.0 * switches / len(budgets),
    }


def compared(setup: Setup, bounds: tuple[int, int], stretch: float) -> dict[str, Any]:
    """All policies at all loads: means over the seeds. `stretch` divides arrivals' time, as the
    setup's times.
    """
    low, high = bounds
    rate = capacity(setup, high)
    limit = PATIENCE * simulate([0.0], setup, (high, high)).requests[0].first_token
    policies: dict[str, tuple[tuple[int, int], Rule | None]] = {
        f"fixed {b}": ((b, b), None) for b in (high, low)
    }
    policies |= {f"adaptive, {name}": (bounds, rule) for name, rule in RULES.items()}
    found: dict[str, Any] = {}
    for load, parts in LOADS.items():
        # The rule's seconds are not divided: a faster server sees more requests in the same time.
        share = min(1.0, 10.0 / stretch)
        stretches = [(seconds * share, multiple * rate) for seconds, multiple in parts]
        total = sum(seconds for seconds, _ in stretches)
        for name, (policy, rule) in policies.items():
            runs = [
                figures(simulate(poisson(stretches, seed), setup, policy, rule), total, limit, high)
                for seed in SEEDS
            ]
            means = {key: round(statistics.fmean(run[key] for run in runs), 4) for key in runs[0]}
            found.setdefault(load, {})[name] = means
    return {
        "capacity_at_high": rate,
        "capacity_at_low": capacity(setup, low),
        "ttft_limit": limit,
        "loads": found,
    }


def markdown(data: dict[str, Any]) -> str:
    """The same as tables."""
    lines = [
        "# A default budget that follows the load: simulation",
        "",
        f"`{data['command']}`",
        "",
        data["note"],
        "",
    ]
    setup = {key: value for key, value in data["setup"].items() if key != "times"}
    lines += [
        "Service times in seconds, measured: " + json.dumps(data["times"]),
        "",
        f"Setup: {json.dumps(setup)}",
        "",
    ]
    for machine, run in data["machines"].items():
        lines += [f"## {machine}", ""]
        lines += [
            f"Capacity at {data['high']} tokens {run['capacity_at_high']:.2f}, at {data['low']} "
            f"{run['capacity_at_low']:.2f} requests/s; a first token within "
            f"{run['ttft_limit']:.3f} s is good.",
            "",
        ]
        for load, policies in run["loads"].items():
            lines += [f"### {load}", ""]
            lines += [
                "| policy | TTFT p50 s | p95 s | goodput /s | mean budget | at HIGH | "
                "changes/min | switches/100 |"
            ]
            lines += ["|---|---|---|---|---|---|---|---|"]
            for name, found in policies.items():
                lines.append(
                    f"| {name} | {found['ttft_p50']:.3f} | {found['ttft_p95']:.3f} | "
                    f"{found['goodput']:.2f} | "
                    f"{found['mean_budget']:.0f} | {100 * found['at_high']:.0f} % | "
                    f"{found['changes_per_minute']:.1f} | "
                    f"{found['switches_per_100_requests']:.1f} |"
                )
            lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Simulate, and write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--low", type=int, default=64)
    parser.add_argument("--high", type=int, default=288)
    parser.add_argument("--times", type=Path, default=RESULTS / "service-times-cpu.json")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    measured = json.loads(args.times.read_text())["seconds"]
    times = Times(
        **{field.name: max(0.0, measured[field.name]) for field in dataclasses.fields(Times)}
    )
    setups = {
        "as measured": (Setup(times), 1.0),
        f"{FASTER:g} times faster": (Setup(times.faster(FASTER)), FASTER),
    }
    data: dict[str, Any] = {
        "command": " ".join(
            ["python -m benchmarks.adaptive", *(sys.argv[1:] if argv is None else argv)]
        ).strip(),
        "note": "Figures are of a simulation, not of a server. `at HIGH`: share of "
        "requests that got HIGH; `switches`: "
        "requests whose budget differs from that of the request before; `changes`: of the "
        "default budget. Means of "
        f"{len(SEEDS)} seeds; {SECONDS:g} s of arrivals, a fifth of that on the faster machine.",
        "low": args.low,
        "high": args.high,
        "times": vars(times),
        "setup": dataclasses.asdict(Setup(times)),
        "rules": {name: dataclasses.asdict(rule) for name, rule in RULES.items()},
        "machines": {
            name: compared(setup, (args.low, args.high), stretch)
            for name, (setup, stretch) in setups.items()
        },
    }
    write_json(args.out / "adaptive-simulation.json", data)
    (args.out / "adaptive-simulation.md").write_text(markdown(data))
    print(markdown(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
