"""The speed to reach, and whether a run reached it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .cells import CDPRUNER, FSR, GEMM, LITERAL, STEPS, Result
from .inputs import Cell


@dataclass(frozen=True)
class Verdict:
    """One target; `met` is None where it was not measured, and where the figure is only to be
    reported.
    """

    device: str
    target: str
    found: str = "-"
    met: bool | None = None
    report_only: bool = False

    @property
    def word(self) -> str:
        if self.found == "-":
            return "not measured"
        return "reported" if self.report_only else "met" if self.met else "missed"

    def __str__(self) -> str:
        return f"{self.device:4}  {self.word:12}  {self.target}: {self.found}"


def judged(device: str, results: Sequence[Result]) -> list[Verdict]:
    """All targets, those of other devices as not measured."""
    here = {"cpu": [], "cuda": [], device: list(results)}
    gpu, cpu = here["cuda"], here["cpu"]
    return [
        _at_most(gpu, 576, 64, 1, 0.25),
        _at_most(gpu, 576, 64, 16, 0.05),
        _at_most(gpu, 2880, 320, 1, 1.0),
        _never_slower(gpu, STEPS),
        _never_slower(gpu, CDPRUNER),
        _to_literal(gpu, "cuda"),
        _near_gemm(cpu),
        _to_literal(cpu, "cpu"),
    ]


def _at_most(results: Sequence[Result], n: int, k: int, batch: int, limit: float) -> Verdict:
    found = _of(results, FSR, lambda cell: (cell.n, cell.k, cell.batch) == (n, k, batch))
    target = f"FSR (K_F = K/4) {n} -> {k}, batch {batch}: at most {limit} ms per image"
    if not found:
        return Verdict("cuda", target)
    times = ", ".join(f"{row.timing.median:.3f} ms at D = {row.cell.d}" for row in found)
    return Verdict("cuda", target, times, all(row.timing.median <= limit for row in found))


def _never_slower(results: Sequence[Result], other: str) -> Verdict:
    name = other if other == STEPS else "method cdpruner of this package"
    target = f"FSR (K_F = K/4) never slower than the {name}"
    times = {row.cell: row.timing.median for row in results if row.name == other}
    pairs = [
        (row.timing.median / times[row.cell], row.cell)
        for row in _of(results, FSR)
        if row.cell in times
    ]
    if not pairs:
        return Verdict("cuda", target)
    worst, cell = max(pairs, key=lambda pair: pair[0])
    slower = sum(ratio > 1 for ratio, _ in pairs)
    return Verdict(
        "cuda",
        target,
        f"slower in {slower} of {len(pairs)}; most {worst:.2f} times at {cell}",
        not slower,
    )


def _near_gemm(results: Sequence[Result]) -> Verdict:
    target = "FSR (K_F = K/4) 576 -> 64 at D = 1024, batch 1: "
    target += "at most 1.5 times its own similarity GEMM plus 2 ms"
    wanted = Cell(576, 64, 1024, 1)
    times = {row.name: row.timing.median for row in results if row.cell == wanted}
    if FSR not in times:
        return Verdict("cpu", target)
    limit = 1.5 * times[GEMM] + 2
    found = f"{times[FSR]:.2f} ms, limit 1.5 * {times[GEMM]:.2f} + 2 = {limit:.2f} ms"
    return Verdict("cpu", target, found, times[FSR] <= limit)


def _to_literal(results: Sequence[Result], device: str) -> Verdict:
    target = "FSR (K_F = K/4), time of the literal torch loop in times of it"
    ratios = [1 / row.ratios[LITERAL] for row in _of(results, FSR)]
    if not ratios:
        return Verdict(device, target, report_only=True)
    found = f"{min(ratios):.1f} to {max(ratios):.1f} over {len(ratios)} combinations of sizes"
    return Verdict(device, target, found, report_only=True)


def _of(
    results: Sequence[Result], name: str, wanted: Callable[[Cell], bool] = lambda cell: True
) -> list[Result]:
    return [row for row in results if row.name == name and wanted(row.cell)]
