"""Time per image of every pruning method and every greedy loop, beside literal versions of FSR and
CDPruner.

    python -m benchmarks.methods                      # all devices there are; a few minutes on 2
    cores python -m benchmarks.methods --quick              # a part of it in less than a minute
    python -m benchmarks.methods --device cuda --methods fsr cdpruner farthest

Writes methods-DEVICE.md and .json into --out and prints which targets of speed were met. Sizes that
would take longer than the limits allow are left out and listed; --cell-seconds and --total-seconds
raise the limits.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch

from fsr_vllm.methods import list_methods

from .cells import KERNELS, Bench
from .inputs import Cell
from .report import Run, machine, write
from .targets import judged

_FULL = {
    "tokens": [576, 2880],
    "keep": [64, 128, 192, 320, 640],
    "dims": [1024, 4096],
    "batches": [1, 16],
}
_QUICK = [Cell(576, 64, 1024, 1), Cell(576, 64, 1024, 16), Cell(2880, 320, 1024, 1)]


def cells(args: argparse.Namespace) -> list[Cell]:
    """The sizes to measure, the cheapest first: what they take says whether the next ones fit the
    limits.
    """
    asked = {name: getattr(args, name) or values for name, values in _FULL.items()}
    if args.quick and asked == _FULL and not args.pairs:
        return _QUICK
    pairs = args.pairs or itertools.product(asked["tokens"], asked["keep"])
    grid = itertools.product(pairs, asked["dims"], asked["batches"])
    found = [Cell(*pair, *sizes) for pair, *sizes in grid if pair[1] < pair[0]]
    return sorted(found, key=lambda cell: (cell.n**2 * cell.d * cell.batch, cell.k))


def measured(device: str, args: argparse.Namespace) -> Run:
    """One run over all sizes on one device."""
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
        args.dtype
    ]
    wanted = tuple(args.methods or (*list_methods(), *KERNELS))
    bench = Bench(device, dtype, wanted, args.repeats, args.cell_seconds)
    about, started = machine(device), time.perf_counter()
    plan = cells(args)
    least = min((cell.d for cell in plan), default=0)
    with torch.inference_mode():
        for cell in plan:
            if time.perf_counter() - started > args.total_seconds:
                bench.skipped.append((cell, "everything"))
                continue
            print(f"{device}: {cell} ...", file=sys.stderr, flush=True)
            bench.run(cell, with_kernels=cell.d == least)  # the loops never see D
    seconds = time.perf_counter() - started
    return Run(device, args.command, about | {"dtype of the features": args.dtype}, seconds, bench)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=(__doc__ or "").partition("\n")[0]
    )
    names = (*list_methods(), *KERNELS)
    parser.add_argument("--device", choices=("all", "cpu", "cuda"), default="all")
    parser.add_argument(
        "--threads", type=int, help="of torch on the CPU (default: torch's own choice)"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=names,
        metavar="NAME",
        help="methods, farthest, dpp, coverage",
    )
    parser.add_argument(
        "--quick", action="store_true", help="three combinations of sizes, in less than a minute"
    )
    parser.add_argument(
        "--repeats", type=int, default=9, help="runs per figure, fewer where time is short"
    )
    parser.add_argument(
        "--cell-seconds",
        type=float,
        help="limit for one combination of sizes (default 20; quick: 8)",
    )
    parser.add_argument(
        "--total-seconds", type=float, help="no combination is begun later (default 315; quick: 25)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the features",
    )
    for name, values in _FULL.items():
        given = " ".join(map(str, values))
        parser.add_argument(
            f"--{name}", type=int, nargs="+", metavar=name[0].upper(), help=f"instead of {given}"
        )
    parser.add_argument(
        "--pairs", type=_pair, nargs="+", metavar="N:K", help="instead of all --tokens and --keep"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder for the report"
    )
    args = parser.parse_args(argv)
    args.command = " ".join([parser.prog, *argv])
    args.cell_seconds = args.cell_seconds or (8 if args.quick else 20)
    args.total_seconds = args.total_seconds or (25 if args.quick else 315)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if min(itertools.chain([1], *(args.pairs or []))) < 1:
        parser.error("sizes must be 1 or more")
    if args.repeats < 1 or (args.threads is not None and args.threads < 1):
        parser.error("--repeats and --threads must be 1 or more")
    if any(min(getattr(args, name) or [1]) < 1 for name in _FULL):
        parser.error("sizes must be 1 or more")
    return args


def _pair(text: str) -> tuple[int, int]:
    tokens, keep = text.split(":")
    return int(tokens), int(keep)


def main(argv: list[str] | None = None) -> int:
    args = arguments(sys.argv[1:] if argv is None else argv)
    available = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for device in available if args.device == "all" else [args.device]:
        run = measured(device, args)
        for line in judged(run.device, run.bench.results):
            print(line)
        for path in write(run, args.out):
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
