"""The report of one run: Markdown to read, JSON to compare."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fsr_vllm
from fsr_vllm.methods import list_methods

from .cells import (
    COSINES,
    FSR,
    FSR_RANDOM,
    GEMM,
    KERNELS,
    LITERAL,
    STEPS,
    Bench,
    Result,
    kernel_name,
)
from .inputs import Cell
from .targets import judged


@dataclass(frozen=True)
class Run:
    """What was measured on one device, how, and where."""

    device: str
    command: str
    machine: dict[str, Any]
    seconds: float
    bench: Bench


def machine(device: str) -> dict[str, Any]:
    """What figures depend on, read before the run."""
    about: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "torch threads": torch.get_num_threads(),
        "load before the run": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "fsr_vllm": fsr_vllm.__version__,
    }
    if device == "cuda":
        about |= {"GPU": torch.cuda.get_device_name(), "CUDA": torch.version.cuda}
    return about


def write(run: Run, folder: Path) -> list[Path]:
    """Write both files into the folder, which is made if need be; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text, data = folder / f"methods-{run.device}.md", folder / f"methods-{run.device}.json"
    text.write_text(_markdown(run), encoding="utf-8")
    data.write_text(json.dumps(_data(run), indent=1) + "\n", encoding="utf-8")
    return [text, data]


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(
                line.partition(":")[2].strip() for line in lines if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _data(run: Run) -> dict[str, Any]:
    return {
        "command": run.command,
        "device": run.device,
        "machine": run.machine,
        "seconds": round(run.seconds, 1),
        "unit": "ms per image",
        "targets": [
            {**asdict(verdict), "verdict": verdict.word}
            for verdict in judged(run.device, run.bench.results)
        ],
        "results": [asdict(result) for result in run.bench.results],
        "failed": [
            {"cell": asdict(cell), "what": what, "why": why} for cell, what, why in run.bench.failed
        ],
        "skipped": [{"cell": asdict(cell), "what": what} for cell, what in run.bench.skipped],
    }


def _markdown(run: Run) -> str:
    results, skipped = run.bench.results, run.bench.skipped
    parts = [
        f"# Time per image of methods and kernels: {'CPU' if run.device == 'cpu' else 'GPU'}",
        f"`{run.command}`, {run.seconds:.0f} s.",
        "\n".join(f"- {name}: {value}" for name, value in run.machine.items()),
        f"""\
Milliseconds per image: median of repeated runs after warming up, and quartiles. Ratios are those of medians of the same
sizes in the same run; the rows they are made of, FSR and CDPruner were run in turns.

- {GEMM}: the product of all pairs of rows of length 1, as FSR needs it; {COSINES}: with scaling the rows before and
  limiting the values after it.
- {LITERAL}: the equations one step and one image at a time, in torch, on the same inputs as `{FSR}`.
- {STEPS}: its loop as described, in torch, batched, some operations per step, on the same inputs.
- `{FSR}`: inputs made so that focus ends at K/4 (checked) and the scan finds the other 3/4 of K.
- `{FSR_RANDOM}`: log-normal saliency, normal relevance; where K_F is above K nothing is compared or scanned.""",
        "## Targets",
        _table(
            ("device", "target", "found", ""),
            ((v.device, v.target, v.found, v.word) for v in judged(run.device, results)),
        ),
    ]
    cells = list(dict.fromkeys(result.cell for result in results))
    parts += ["## FSR beside its baselines, ms per image", _overview(results, cells)]
    parts.append("## Methods")
    for cell in cells:
        rows = sorted(
            (row for row in results if row.cell == cell and row.kind != "kernel"), key=_place
        )
        parts += [
            f"### {cell}",
            _timings(rows, (GEMM, LITERAL, STEPS)),
            _left_out(skipped, cell, kernels=False),
        ]
    loops = [result for result in results if result.kind == "kernel"]
    if loops:
        parts.append(
            "## Kernels\n\nOver a similarity matrix that is there already, nothing chosen beforehand."
        )
    for cell in dict.fromkeys(result.cell for result in loops):
        rows = [result for result in loops if result.cell == cell]
        title = f"### {cell.n} -> {cell.k}, batch {cell.batch}"
        parts += [title, _kernels(rows), _left_out(skipped, cell, kernels=True)]
    if run.bench.failed:
        reasons = (f"- {cell}: {what}: {why}" for cell, what, why in run.bench.failed)
        parts += ["## Cannot run at these sizes", "\n".join(reasons)]
    whole = [str(cell) for cell, what in skipped if what == "everything"]
    if whole:
        parts += ["## Not measured for want of time", "\n".join(f"- {cell}" for cell in whole)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _overview(results: Sequence[Result], cells: Iterable[Cell]) -> str:
    names = (FSR, GEMM, LITERAL, STEPS)
    lines = []
    for cell in cells:
        found = {result.name: result for result in results if result.cell == cell}
        if FSR not in found:
            continue
        times = [f"{found[name].timing.median:.3f}" for name in names]
        ratios = [f"{found[FSR].ratios[name]:.2f}" for name in names[1:]]
        lines.append((cell.n, cell.k, cell.d, cell.batch, *times, *ratios))
    head = ("N", "K", "D", "batch", *names, "FSR / GEMM", "FSR / literal", "FSR / CDPruner")
    return _table(head, lines) if lines else ""


def _timings(rows: Sequence[Result], bases: Sequence[str]) -> str:
    head = ("", "ms", "quartiles", "runs", *(f"/ {base}" for base in bases), "")
    return _table(
        head,
        ((*_row(row), *(f"{row.ratios[base]:.2f}" for base in bases), row.note) for row in rows),
    )


def _kernels(rows: Sequence[Result]) -> str:
    times = {row.name: row.timing.median for row in rows}
    lines = []
    for row in rows:
        base = times.get(kernel_name(row.name.partition(",")[0], "reference"))
        to_reference = f"{row.timing.median / base:.3f}" if base else "-"
        lines.append((*_row(row), f"{row.ratios[GEMM]:.2f}", to_reference))
    return _table(
        ("", "ms", "quartiles", "runs", f"/ {GEMM} (D = {rows[0].cell.d})", "/ reference"), lines
    )


def _place(row: Result) -> int:
    """Baselines first, then methods as they are registered: they were measured in another order in
    each cell.
    """
    return -1 if row.kind == "baseline" else list(list_methods()).index(row.name.partition(",")[0])


def _row(row: Result) -> tuple[str, str, str, str]:
    timing = row.timing
    return (
        row.name,
        f"{timing.median:.3f}",
        f"{timing.low:.3f} - {timing.high:.3f}",
        str(timing.runs),
    )


def _left_out(skipped: Sequence[tuple[Cell, str]], cell: Cell, kernels: bool) -> str:
    loops = [
        what
        for at, what in skipped
        if at == cell and (what.partition(",")[0] in KERNELS) == kernels
    ]
    return f"Not measured for want of time: {'; '.join(loops)}." if loops else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
