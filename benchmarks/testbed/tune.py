"""Hyper-parameters of every method, on the validation split: the same number of tries for each,
then the best one.

`python -m benchmarks.testbed.tune` writes benchmarks/results/tuning.json; `evaluate` reads it. The
first try of a method is its published default, the others are drawn from `SPACE` by a fixed seed.
All tries are run on a part of the questions, the better half of them on three times as many, the
best quarter on all; what is compared is the mean over families and budgets.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.records import write_json
from fsr_vllm.methods import get_method, list_methods

from .bench import Bench, pool_of
from .export import SHIPPED
from .questions import FAMILIES
from .stats import macro

TRIES = 24
BUDGETS = (16, 32)
# Values worth trying, by method and option. What is not here has nothing to tune, or nothing on one
# small grid.
SPACE: dict[str, dict[str, tuple[Any, ...]]] = {
    "fsr": {"alpha": (0.5, 1.0, 3.0), "max_focus_share": (0.25, 0.5, 0.75, 1.0), "focus_rule":
    ("clamp", "whole"), "scan": ("farthest", "coverage"), "coverage_mix": (0.0, 0.3, 0.6, 0.9),
    "refine": ("phi", "soft", "off")},
    "cdpruner": {"weighting": ("product", "exp"), "theta": tuple(round(0.05 * i, 2) for i in
    range(1, 20))}, "vispruner": {"ratio": (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0), "step": (4,
    8, 16)}, "visionzip": {"contextual_share": tuple(round(0.04 * i, 2) for i in range(24))},
    "holov": {"rule": ("paper", "code"), "crops": (4, 9, 16, 36), "gamma": (0.0, 0.05, 0.09, 0.3),
    "tau": (0.5, 1.0)}, "scope": {"alpha": tuple(round(0.2 * i, 1) for i in range(24))},
    "zspaprune": {"core_share": tuple(round(i / 23, 3) for i in range(24))}, "hiprune": {"alpha":
    tuple(round(i / 23, 3) for i in range(24))}, "prumerge": {"variant": ("base", "plus"),
    "neighbours": (1, 2, 4, 8, 16, 24, 32, 48)}, "vscan": {"window": (2, 3, 4, 6, 12), "merge":
    (True, False)}, "vflowopt": {"threshold": (5.0, 15.0, 34.76, 60.0, 80.0, 95.0), "cell": (2.0,
    4.0, 8.0, 15.58)}, "visiondrop": {"contextual_share": tuple(round(0.04 * i, 2) for i in
    range(24))}, "dart": {"image_pivots": (1, 2, 4, 8, 12), "text_pivots": (0, 1, 2, 4, 8)}, "ivc":
    {"seed_share": (0.0, 0.01, 0.05, 0.1), "position_share": (0.0, 0.05, 0.1, 0.2)},
}  # fmt: skip


def tries(method: str, count: int = TRIES) -> list[dict[str, Any]]:
    """The published default ({}), then options drawn without repetition; fewer where the space
    holds fewer.
    """
    space: dict[str, tuple[Any, ...]] = SPACE[method]
    found: list[dict[str, Any]] = [{}]
    known = {_key(method, {})}
    random = np.random.default_rng([13, list(list_methods()).index(method)])
    for _ in range(1000):
        if len(found) == count:
            break
        drawn = {name: values[random.integers(len(values))] for name, values in space.items()}
        if (key := _key(method, drawn)) not in known:
            known.add(key)
            found.append(drawn)
    return found


def tune(method: str, per_family: int, model: Path, device: str) -> list[dict[str, Any]]:
    """Every try of a method, best first, with its accuracy and how many questions per family it is
    known on.
    """
    torch.set_num_threads(1)
    bench = _bench(per_family, model, device)
    results: list[dict[str, Any]] = [
        {"options": options, "accuracy": 0.0, "per_family": 0} for options in tries(method)
    ]
    alive = results
    for share in (6, 2, 1):
        part = _first(bench, math.ceil(per_family / share))
        for result in alive:
            result["accuracy"] = float(
                np.mean([_accuracy(part, method, b, result["options"]) for b in BUDGETS])
            )
            result["per_family"] = math.ceil(per_family / share)
        alive = sorted(alive, key=lambda result: -result["accuracy"])[: max(1, len(alive) // 2)]
    return sorted(results, key=lambda result: (-result["per_family"], -result["accuracy"]))


def _first(bench: Bench, per_family: int) -> Bench:
    """The first questions of every family."""
    return bench.subset(
        np.concatenate([np.flatnonzero(bench.families == f)[:per_family] for f in FAMILIES])
    )


def _accuracy(bench: Bench, method: str, budget: int, options: dict[str, Any]) -> float:
    return macro(bench.method(method, budget, options).right, bench.families, list(FAMILIES))


@functools.cache
def _bench(per_family: int, model: Path, device: str) -> Bench:
    """One per worker process, for all methods it tunes."""
    return Bench("validation", per_family, model, device)


def _key(method: str, options: dict[str, Any]) -> str:
    """Two settings that differ only in an option that has no effect are one."""
    made = get_method(method, **options)
    values = {item.name: getattr(made, item.name) for item in fields(made)}
    if method == "fsr":
        unread = {"farthest": ("coverage_mix", "coverage_gamma"), "phi": ("temperature",)}
        unread |= {"soft": ("kappa",), "off": ("kappa", "temperature")}
        for name in (*unread.get(values["scan"], ()), *unread[values["refine"]]):
            values.pop(name)
    if method == "vispruner":
        values["step"] = values["step"] or 8  # what it comes to at this size
    if method == "cdpruner" and values["weighting"] == "product":
        values.pop("theta")
    return json.dumps(values, sort_keys=True)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.testbed.tune", description=__doc__)
    parser.add_argument("--per-family", type=int, default=300)
    parser.add_argument("--methods", nargs="*", default=list(SPACE), choices=list(SPACE))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tuning.json"))
    args = parser.parse_args(argv)
    settings = {
        "split": "validation",
        "per_family": args.per_family,
        "budgets": BUDGETS,
        "tries": TRIES,
    }
    command = shlex.join(
        ["python", "-m", "benchmarks.testbed.tune", *(sys.argv[1:] if argv is None else argv)]
    )
    report: dict[str, Any] = {"command": command, **settings, "methods": {}}
    if args.output.exists():
        old = json.loads(args.output.read_text())
        if set(old["methods"]) - set(args.methods):  # which stay as they are
            report |= {
                "command": old["command"],
                "again": list(dict.fromkeys([*old.get("again", []), command])),
            }
        report["methods"] = old["methods"]
    with pool_of(args.jobs, args.device) as pool:
        runs = {
            name: pool.submit(tune, name, args.per_family, args.model, args.device)
            for name in args.methods
        }
        for name, run in runs.items():
            report["methods"][name] = run.result()
            best = report["methods"][name][0]
            print(
                f"{name}: {100 * best['accuracy']:.1f} with "
                f"{best['options'] or 'the published default'}",
                flush=True,
            )
            write_json(args.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
