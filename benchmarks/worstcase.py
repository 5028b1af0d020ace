"""What the most expensive request costs: every method and option at 2,880 and 9,000 tokens, in
units of served FSR's.

    python -m benchmarks.worstcase        # about 20 minutes on one core

A request chooses method, options and budget, and selection runs inside the engine's step, where
everybody waits. So each option is set to its ends (or each of its choices), at budgets of 64, half
and all but one of the tokens. At the first size all are run; at the others each case has the budget
that was its worst there. An option is served where its worst case is at most LIMIT times that of
FSR as served, over budgets, at the largest size. Writes worst-case-cpu.md and .json. Times are
those of the process on one thread, which what else runs on the machine disturbs least. Inputs are
random: an image made for the purpose may cost coverage (`fsr`, `scope`) more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from fsr_vllm.methods import SERVED_DEFAULTS, get_method, list_methods
from fsr_vllm.methods.options import beyond_serving
from fsr_vllm.signals.saliency import attention_map, cls_attention, received_attention

from .inputs import Cell, Images
from .records import write_json
from .report import machine
from .worstcase_report import HEADS, LIMIT, WIDTH, markdown

_LARGE = 1e6  # for an end that an option leaves open
BUDGETS = ("64", "N / 2", "N - 1")
_REFERENCE = "fsr"
# Options that do nothing beside the defaults: what goes with them.
_BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("fsr", "kappa"): {"refine": "phi"},
    ("cdpruner", "theta"): {"weighting": "exp"},
    ("scope", "heads"): {"combine": "sum"},
}


@dataclass
class Case:
    """One method with one option changed from what a request without options gets."""

    method: str
    options: dict[str, Any]
    seconds: dict[int, dict[str, list[float]]] = field(default_factory=dict)  # by N, then by budget
    estimated: bool = False  # at the largest size, from the cube of N

    @property
    def label(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items()) or "no options"

    @property
    def made(self) -> Any:
        return get_method(self.method, **{**SERVED_DEFAULTS.get(self.method, {}), **self.options})

    def worst(self, n: int) -> tuple[str, float]:
        """The budget that takes longest, and its median."""
        return max(
            ((k, statistics.median(runs)) for k, runs in self.seconds[n].items()),
            key=lambda found: found[1],
        )


def cases(n: int) -> Iterator[Case]:
    """Every method as requests get it without options, and with each option at its ends."""
    for name in list_methods():
        yield Case(name, {})
        for item in fields(get_method(name)):
            default = SERVED_DEFAULTS.get(name, {}).get(item.name, item.default)
            for value in _ends(item, n):
                if value != default:
                    yield Case(name, {**_BESIDE.get((name, item.name), {}), item.name: value})


def _ends(item: Any, n: int) -> list[Any]:
    about = item.metadata
    if about.get("choices"):
        return list(about["choices"])
    if isinstance(item.default, bool):
        return [not item.default]
    low, high = about.get("low"), about.get("high")
    ends = [low, high if high is not None else _LARGE if isinstance(item.default, float) else n]
    if about["served"] is not None:
        ends = [1, about["served"].least(n)]
    return [type(item.default)(end) for end in ends if end is not None]


def _budget(name: str, n: int) -> int:
    return {"64": 64, "N / 2": n // 2, "N - 1": n - 1}[name]


def run(found: list[Case], n: int, first: int, repeats: int, seconds: float) -> None:
    """Time all cases at n, in turns; each stops once it has had `seconds`."""
    images = Images.draw(Cell(n, 64, 1024, 1), "cpu", torch.float32)
    inputs = {
        name: images.tokens(get_method(name))
        for name in dict.fromkeys(case.method for case in found)
    }
    for turn in range(repeats):
        print(
            f"N = {n}, turn {turn + 1} of {repeats}, {len(found)} cases",
            file=sys.stderr,
            flush=True,
        )
        for case in found:
            reference = case.method == _REFERENCE and not case.options
            names = BUDGETS if n == first or reference else (case.worst(first)[0],)
            runs = case.seconds.setdefault(n, {name: [] for name in names})
            if sum(map(sum, runs.values())) > seconds and not reference:
                continue
            for name in names:
                started = time.process_time()
                case.made.prune(inputs[case.method], _budget(name, n), validate=False)
                runs[name].append(time.process_time() - started)


def signals(n: int) -> dict[str, float]:
    """Seconds to form a signal from one layer's queries and keys."""
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, n + 1, WIDTH, generator=g) for _ in range(2))
    scale = (WIDTH / HEADS) ** -0.5
    forms: dict[str, Any] = {
        "saliency": lambda: cls_attention(query, key, HEADS, scale),
        "received": lambda: received_attention(query, key, HEADS, scale, 1, prefix_gives=True),
        "attention": lambda: attention_map(query, key, HEADS, scale),
    }
    taken = {}
    for name, form in forms.items():
        runs = []
        for _ in range(3):
            started = time.process_time()
            form()
            runs.append(time.process_time() - started)
        taken[name] = statistics.median(runs)
    return taken


def verdict(case: Case, sizes: list[int], limit: float) -> str:
    """Whether requests may ask for it, and if so whether that is right."""
    if not list_methods()[case.method].servable:
        return "not served: inputs"
    if beyond_serving(case.made, sizes[-1]) is not None:
        return "refused to requests"
    return "served" if case.worst(sizes[-1])[1] <= limit else "SERVED, AND TOO DEAR"


def main(argv: list[str] | None = None) -> int:
    """Command line; 1 if something is served that costs more than the limit."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.worstcase", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2880, 9000])
    parser.add_argument(
        "--methods", nargs="+", default=list(list_methods()), choices=list(list_methods())
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="of one case at one size, after which it rests"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    given, started, about = sys.argv[1:] if argv is None else argv, time.monotonic(), machine("cpu")
    sizes = sorted(args.tokens)
    found = [case for case in cases(sizes[-1]) if case.method in {_REFERENCE, *args.methods}]
    with torch.inference_mode():
        for n in sizes:
            dear = [
                case for case in found if n != sizes[0] and beyond_serving(case.made, n) is not None
            ]
            run(
                [case for case in found if case not in dear],
                n,
                sizes[0],
                args.repeats,
                args.seconds,
            )
            for case in dear:  # minutes each, and refused anyway
                name, seconds = case.worst(sizes[0])
                case.seconds[n], case.estimated = {name: [seconds * (n / sizes[0]) ** 3]}, True
        formed = {str(n): signals(n) for n in sizes}
    reference = {n: found[0].worst(n)[1] for n in sizes}
    report: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.worstcase", *given]),
        "seconds": round(time.monotonic() - started),
        "machine": about,
        "sizes": sizes,
        "signals": formed,
        "rows": [],
    }
    for case in found:
        at = {}
        for n in sizes:
            name, seconds = case.worst(n)
            at[str(n)] = {"budget": name, "seconds": seconds, "share": seconds / reference[n]}
        word = verdict(case, sizes, LIMIT * reference[sizes[-1]])
        report["rows"].append(
            {
                "method": case.method,
                "options": case.label,
                "at": at,
                "estimated": case.estimated,
                "requests": word,
            }
        )
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "worst-case-cpu.json", report)
    (args.out / "worst-case-cpu.md").write_text(markdown(report))
    print(markdown(report))
    return int(any(row["requests"] == "SERVED, AND TOO DEAR" for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
