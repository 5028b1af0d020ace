"""Accuracy per family and budget of all methods: `python -m benchmarks.testbed.evaluate`.

Rows: every method as published, every method that has something to tune as tuned on the validation
split (`tune`), FSR as served, the oracle, and controls: the question replaced, the sign of
relevance flipped, relevance left out. The held-out questions are the same for all rows, so
differences are paired. Writes accuracy.json, .md and .svg.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.records import write_json
from fsr_vllm.methods import SERVED_DEFAULTS, list_methods

from .bench import GENERIC, Bench, Outcome, pool_of
from .export import SHIPPED
from .questions import FAMILIES
from .report import markdown, plot
from .scenes import PATCHES
from .stats import admitted, compare, macro, standard_error
from .tune import BUDGETS as TUNED_AT

BUDGETS = (16, 32, 72)  # 11, 22 and 50 % of 144


@dataclass
class Row:
    """One line of the tables."""

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    sign: int = 1
    kind: str = "published"  # published, tuned, served, control, ceiling


def rows(tuning: dict[str, Any], only: Sequence[str] = ()) -> list[Row]:
    """All lines: what is published, tuned and served, the oracle and the controls; `only` names
    methods.
    """
    found = [Row(name, name) for name in list_methods()]
    for name, results in tuning.items():
        best = results[0]["options"]
        if best:
            found.append(Row(f"{name} (tuned)", name, best, kind="tuned"))
    if served := SERVED_DEFAULTS.get("fsr"):
        found.append(Row("fsr (served)", "fsr", served, kind="served"))
    base, unasked = dict(SERVED_DEFAULTS.get("fsr", {})), {"alpha": 0.0, "coverage_mix": 0.0}
    found += [
        Row("oracle", "oracle", kind="ceiling"),
        Row("fsr (served), generic text", "fsr", base, text=GENERIC, kind="control"),
        Row("fsr (served), sign flipped", "fsr", base, sign=-1, kind="control"),
        Row("fsr (served), no relevance", "fsr", base | unasked, kind="control"),
    ]
    return [row for row in found if not only or row.method in only or row.label in only]


def budgets_of(row: Row, budgets: Sequence[int]) -> list[int]:
    """Tuned rows and controls run where they were tuned: at larger budgets rows hardly differ."""
    return [
        budget
        for budget in budgets
        if row.kind in ("published", "served", "ceiling") or budget <= max(TUNED_AT)
    ]


def outcome(bench: Bench, row: Row, budget: int) -> Outcome:
    """Ask all questions with what this row keeps."""
    if row.method == "oracle":
        return bench.oracle(budget)
    return bench.method(row.method, budget, row.options, text=row.text, sign=row.sign)


def summarise(
    bench: Bench, row: Row, budget: int, found: Outcome, families: Sequence[str]
) -> dict[str, Any]:
    """One row at one budget, as it is written: accuracies in per cent, errors over scenes."""
    present = [family for family in FAMILIES if family in bench.families]
    by_family = {
        family: 100 * float(found.right[bench.families == family].mean()) for family in present
    }
    return asdict(row) | {
        "budget": budget,
        "mean": 100 * macro(found.right, bench.families, families),
        "standard_error": 100
        * standard_error(found.right, bench.families, bench.scene_of, families),
        "families": by_family,
        "focus_share": found.focus_share,
        "scan": found.scan,
        "merged": found.merged,
    }


@functools.cache
def _bench(
    split: str, per_family: int, folder: Path, device: str, families: tuple[str, ...]
) -> Bench:
    """One per worker process."""
    return _about(Bench(split, per_family, folder, device), families)


def _about(bench: Bench, families: Sequence[str]) -> Bench:
    return bench.subset(np.flatnonzero(np.isin(bench.families, families)))


def _one(
    split: str,
    per_family: int,
    folder: Path,
    device: str,
    families: tuple[str, ...],
    row: Row,
    budget: int,
) -> Outcome:
    torch.set_num_threads(1)
    return outcome(_bench(split, per_family, folder, device, families), row, budget)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Run all rows at all budgets; the report that is written."""
    started = time.monotonic()
    tuning = json.loads(args.tuning.read_text())["methods"] if args.tuning.exists() else {}
    lines = rows(tuning, args.methods)
    bench = Bench(args.split, args.per_family, args.model, args.device)
    full = bench.off()
    majority, right = (
        bench.majority(),
        {f: float(full.right[bench.families == f].mean()) for f in FAMILIES},
    )
    families = admitted(right, majority, args.per_family)
    found: dict[tuple[str, int], Outcome] = {}
    source = (args.split, args.per_family, args.model, args.device)
    with pool_of(args.jobs, args.device) as pool:
        jobs = {
            pool.submit(_one, *source, tuple(families), row, budget): (row.label, budget)
            for row in lines
            for budget in budgets_of(row, args.budgets)
        }
        for job in tqdm(
            as_completed(jobs), total=len(jobs), desc="rows", unit="row", mininterval=1
        ):
            found[jobs[job]] = job.result()
    full_row = Row("all tokens", "off", kind="ceiling")
    report: dict[str, Any] = {
        "command": _command(args),
        "split": args.split,
        "questions_per_family": args.per_family,
        "admitted": families,
        "majority": {family: 100 * value for family, value in majority.items()},
        "full": summarise(bench, full_row, PATCHES, full, families),
        "rows": [],
    }
    bench = _about(bench, families)
    for row in lines:
        for budget in budgets_of(row, args.budgets):
            mine = found[row.label, budget]
            entry = summarise(bench, row, budget, mine, families)
            for reference in args.against:
                if (reference, budget) in found and row.label != reference:
                    other = found[reference, budget]
                    entry[f"against {reference}"] = compare(
                        mine, other, bench.families, bench.scene_of, families
                    )
            report["rows"].append(entry)
    report["seconds"] = round(time.monotonic() - started)
    return report


def merged(old: dict[str, Any], new: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """An earlier report with the rows that were run anew, and without those that no longer exist;
    in order of labels.

    ValueError if the two are not about the same questions to the same model.
    """
    for key in ("split", "questions_per_family", "admitted", "majority", "full"):
        if json.dumps(old[key]) != json.dumps(new[key]):
            raise ValueError(
                f"the earlier report is about something else: {key} was {old[key]}, is {new[key]}"
            )
    rows: dict[tuple[str, Any], dict[str, Any]] = {}
    for entry in (*old["rows"], *new["rows"]):
        place = entry["label"], entry["budget"]
        rows[place] = (
            rows.get(place, {}) | entry
        )  # comparisons with rows that were not run again stay
    order = sorted(rows, key=lambda key: (labels.index(key[0]) if key[0] in labels else -1, key[1]))
    again = dict.fromkeys([*old.get("again", []), new["command"]])
    return old | {"rows": [rows[key] for key in order if key[0] in labels], "again": list(again)}


def _command(args: argparse.Namespace) -> str:
    return shlex.join(["python", "-m", "benchmarks.testbed.evaluate", *args.given])


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.testbed.evaluate", description=__doc__
    )
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--per-family", type=int, default=1000)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument(
        "--methods", nargs="*", default=[], help="methods or row labels; default: all"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="leave other rows of the report that is there as they are",
    )
    parser.add_argument("--against", nargs="*", default=["random", "cdpruner", "cdpruner (tuned)"])
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--tuning", type=Path, default=Path("benchmarks/results/tuning.json"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--server",
        action="store_true",
        help="instead: ask a running server too, and compare answers",
    )
    parser.add_argument("--server-options", type=shlex.split, default=[], help="of that server")
    parser.add_argument("--server-log", type=Path, help="file that keeps its log")
    args = parser.parse_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    args.output.mkdir(parents=True, exist_ok=True)
    if args.server:
        from .agreement import agreement

        per_family = min(args.per_family, 200)
        bench = Bench(args.split, per_family, args.model)
        result: dict[str, Any] = {"command": _command(args)}
        result |= agreement(
            bench, args.model, server_options=args.server_options, log=args.server_log
        )
        write_json(args.output / "agreement.json", result)
        print(json.dumps(result, indent=2))
        return int(result["different"] > 0)
    report = evaluate(args)
    if args.keep:
        tuning = json.loads(args.tuning.read_text())["methods"] if args.tuning.exists() else {}
        old = json.loads((args.output / "accuracy.json").read_text())
        report = merged(old, report, [row.label for row in rows(tuning)])
    write_json(args.output / "accuracy.json", report)
    (args.output / "accuracy.md").write_text(markdown(report))
    plot(report, args.output / "accuracy.svg")
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
