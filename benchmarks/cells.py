"""Everything that is measured at one combination of sizes, within a time limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from fsr_vllm.kernels import coverage_greedy, dpp_greedy, farthest_from_prefix
from fsr_vllm.methods import PrunedTokens, get_method
from fsr_vllm.methods.ops import cosine_similarity

from .baselines import cdpruner_steps, fsr_literal, similarity_gemm, unit_rows
from .inputs import Cell, Images
from .timing import Call, Timing, measure

GEMM, COSINES, LITERAL, STEPS = (
    "similarity GEMM",
    "cosine matrix",
    "literal FSR loop",
    "CDPruner re-creation",
)
FSR, FSR_RANDOM, CDPRUNER = "fsr, K_F = K/4", "fsr, random signals", "cdpruner"
FSR_SERVED = "fsr, served"
KERNELS = ("farthest", "dpp", "coverage")
_BACKENDS = {"cpu": ("masked", "torch"), "cuda": ("masked", "triton")}
_SHORTEST = 3  # runs that a median needs


@dataclass(frozen=True)
class Result:
    """One row of the report, in milliseconds per image."""

    cell: Cell
    kind: str  # "baseline", "method" or "kernel"
    name: str
    timing: Timing
    ratios: dict[str, float]  # to the medians of baselines of the same cell
    note: str = ""


@dataclass
class Bench:
    """Measures cell after cell; remembers how long things took, so as not to start what would take
    too long.
    """

    device: str
    dtype: torch.dtype
    methods: tuple[str, ...]  # registered names, and those of KERNELS
    repeats: int
    cell_seconds: float
    results: list[Result] = field(default_factory=list)
    skipped: list[tuple[Cell, str]] = field(default_factory=list)  # and what of the cell
    failed: list[tuple[Cell, str, str]] = field(
        default_factory=list
    )  # what of the cell cannot run, and why
    _costs: dict[str, float] = field(
        default_factory=dict
    )  # best seconds per image and unit of work, last cell
    _cells: int = 0

    def run(self, cell: Cell, with_kernels: bool) -> None:
        """Measure a cell: the baselines with FSR and CDPruner in turns, then the other methods and
        the kernels.
        """
        self._cells += 1
        started = time.perf_counter()
        # What ratios are made of may take twice as long as planned; the rest then has to wait for a
        # longer run.
        if (
            self._predicted((GEMM, COSINES, LITERAL, STEPS, FSR, CDPRUNER), cell) * _SHORTEST
            > 2 * self.cell_seconds
        ):
            self.skipped.append((cell, "everything"))
            return
        try:
            images = Images.draw(cell, self.device, self.dtype)
            baselines = self._together(images)
        except torch.OutOfMemoryError as error:
            self.failed.append((cell, "everything", str(error).partition("\n")[0]))
            return

        others = [name for name in self.methods if name not in (*KERNELS, "fsr", "cdpruner")]
        # Begun elsewhere in each cell: what a limit leaves out at one K is measured at another.
        turn = 7 * self._cells % max(1, len(others))
        later = [
            ("method", name, self._method_call(images, name))
            for name in others[turn:] + others[:turn]
        ]
        later += self._kernel_calls(images) if with_kernels else []
        # Cheap things first, by powers of two of the time they take: a slow one must not cost the
        # cell ten others.
        later.sort(key=lambda entry: self._magnitude(entry[1], cell))
        ends = max(started + self.cell_seconds, time.perf_counter() + self.cell_seconds / 3)
        for place, (kind, name, prepare) in enumerate(later):
            left = ends - time.perf_counter()
            if left <= 0 or self._predicted((name,), cell) * _SHORTEST > left:
                self.skipped.append((cell, name))
                continue
            share = min(left, 2 * left / (len(later) - place))
            try:
                timing = measure({name: prepare()}, self.device, self.repeats, share)[name]
            except (
                RuntimeError,
                ValueError,
            ) as error:  # sizes that a method refuses, or too little memory
                self.failed.append((cell, name, str(error).partition("\n")[0]))
                continue
            self._add(cell, kind, name, timing, baselines)

    def _together(self, images: Images) -> dict[str, float]:
        """Medians of the baselines, measured in turns with the methods that targets speak of."""
        cell, weighted, units = images.cell, images.weighted(), unit_rows(images.features)
        assert weighted.saliency is not None and weighted.relevance is not None
        features, saliency, relevance = weighted.features, weighted.saliency, weighted.relevance
        calls: dict[str, Call] = {
            GEMM: lambda: similarity_gemm(units),
            COSINES: lambda: cosine_similarity(features),
            LITERAL: lambda: fsr_literal(features, saliency, relevance, cell.k),
            STEPS: lambda: cdpruner_steps(features, relevance, cell.k),
        }
        notes = {}
        if "fsr" in self.methods:
            fsr, drawn = get_method("fsr"), images.tokens(get_method("fsr"))
            calls[FSR] = lambda: fsr.prune(weighted, cell.k, validate=False)
            calls[FSR_RANDOM] = lambda: fsr.prune(drawn, cell.k, validate=False)
            served = get_method("fsr", preset="served")
            calls[FSR_SERVED] = lambda: served.prune(drawn, cell.k, validate=False)
            notes[FSR] = _checked(calls[FSR](), cell)
            notes |= {name: _stages(calls[name]()) for name in (FSR_RANDOM, FSR_SERVED)}
        if "cdpruner" in self.methods:
            cdpruner = get_method("cdpruner")
            calls[CDPRUNER] = lambda: cdpruner.prune(weighted, cell.k, validate=False)
        timings = measure(calls, self.device, self.repeats, self.cell_seconds / 2)
        medians = {name: timings[name].median / cell.batch for name in (GEMM, LITERAL, STEPS)}
        for name, timing in timings.items():
            kind = "baseline" if name in (GEMM, COSINES, LITERAL, STEPS) else "method"
            self._add(cell, kind, name, timing, medians, notes.get(name, ""))
        return medians

    def _method_call(self, images: Images, name: str) -> Callable[[], Call]:
        def prepare() -> Call:
            method = get_method(name)
            tokens = images.tokens(method)
            return lambda: method.prune(tokens, images.cell.k, validate=False)

        return prepare

    def _kernel_calls(self, images: Images) -> list[tuple[str, str, Callable[[], Call]]]:
        """Each loop with each backend, over the same similarities, from the first token on."""
        similarity, k = cosine_similarity(images.features), images.cell.k
        first = torch.zeros(len(similarity), 1, dtype=torch.int64, device=similarity.device)
        loops: dict[str, Callable[[str], Call]] = {
            "farthest": lambda backend: (
                lambda: farthest_from_prefix(similarity, first, 1, k, backend=backend)
            ),
            "dpp": lambda backend: lambda: dpp_greedy(similarity, k, backend=backend),
            "coverage": lambda backend: lambda: coverage_greedy(similarity, k, backend=backend),
        }

        def prepare(name: str, backend: str) -> Callable[[], Call]:
            return lambda: loops[name](backend)

        return [
            ("kernel", kernel_name(name, backend), prepare(name, backend))
            for name in KERNELS
            if name in self.methods
            for backend in _BACKENDS[self.device]
        ]

    def _predicted(self, names: Iterable[str], cell: Cell) -> float:
        """Seconds of one call of each, from what they took last; 0 if not known."""
        return sum(self._costs.get(name, 0.0) * _work(name, cell) * cell.batch for name in names)

    def _magnitude(self, name: str, cell: Cell) -> int:
        seconds = self._predicted((name,), cell)
        return math.frexp(seconds)[1] if seconds else -99

    def _add(
        self,
        cell: Cell,
        kind: str,
        name: str,
        timing: Timing,
        baselines: dict[str, float],
        note: str = "",
    ) -> None:
        self._costs[name] = timing.least / 1e3 / cell.batch / _work(name, cell)
        each = timing.per(cell.batch)
        ratios = {base: each.median / median for base, median in baselines.items()}
        self.results.append(Result(cell, kind, name, each, ratios, note))


def kernel_name(loop: str, backend: str) -> str:
    """The row of a loop with a backend; "torch" on a CPU is the loop for serving there."""
    return f"{loop}, {'CPU' if backend == 'torch' else backend}"


def _work(name: str, cell: Cell) -> float:
    """Operations per image, roughly, and rather too steep in K than too flat: it serves to say what
    takes too long.
    """
    loop = name.partition(",")[0]
    if loop == "coverage" or name.endswith(", masked"):
        return cell.n**2 * cell.k
    if loop in KERNELS:
        return cell.n * cell.k**2
    return cell.n**2 * cell.d + (30 * cell.n * cell.k**2 if name in (LITERAL, STEPS) else 0)


def _stages(pruned: PrunedTokens) -> str:
    focus, scan = (value.float().mean().item() for value in (pruned.k_focus, pruned.num_scan))
    return f"K_F {focus:.0f}, {scan:.0f} scanned"


def _checked(pruned: PrunedTokens, cell: Cell) -> str:
    """That the scan really has its three quarters of K to find."""
    m = max(1, cell.k // 4)
    if not bool((pruned.k_focus == m).all() & (pruned.num_scan == cell.k - m).all()):
        raise RuntimeError(
            f"K_F is {pruned.k_focus.tolist()}, not {m}: these inputs do not measure what they "
            "should"
        )
    return _stages(pruned)
