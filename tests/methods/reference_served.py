"""FSR as it is served, from its description in docs/methods.md: float64, one image, no production
code.

Every gain is computed anew for every pick, every merge by itself. `tightest` is the narrowest
margin of any comparison: float32 can only be expected to decide the same well above its rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_TIE = 1e-12  # below it two float64 results that ought to be equal may differ


@dataclass
class Served:
    kept: list[int]
    focus: list[int]
    picks: list[int]  # the scan's, in order
    into: list[int]  # for every token its anchor, or -1
    rows: np.ndarray  # (K, D)
    k_focus: int
    tightest: float


def unit_interval(x: np.ndarray) -> np.ndarray:
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high > low else np.ones(len(x))


def cosines(x: np.ndarray) -> np.ndarray:
    length = np.sqrt((x * x).sum(1))
    both = np.outer(length, length)
    return np.divide(x @ x.T, both, out=np.zeros_like(both), where=both > 0)


def first_best(score: np.ndarray, allowed: list[int], margins: list[float]) -> int:
    """The lowest of the allowed places with the highest score; how far the others are below."""
    top = max(score[i] for i in allowed)
    winner = min(i for i in allowed if score[i] >= top - _TIE)
    margins += [top - score[i] for i in allowed if score[i] < top - _TIE]
    return winner


def coverage_gain(cosine: np.ndarray, weight: np.ndarray, chosen: list[int]) -> np.ndarray:
    """For every candidate j: sum over i of w_i max(0, cos_ij - c_i)."""
    cover = np.zeros(len(cosine))
    for j in chosen:
        cover = np.maximum(cover, cosine[:, j])
    return (weight[:, None] * np.maximum(0.0, cosine - cover[:, None])).sum(0)


def served(
    features, saliency, relevance, k, *, alpha=0.5, rho=0.9, share=0.75, mix=0.6, gamma=3.0,
    temperature=0.05,
) -> Served:  # fmt: skip
    """K < N of the tokens of one image; relevance may be None."""
    x, s = np.asarray(features, np.float64), unit_interval(np.asarray(saliency, np.float64))
    n, margins = len(x), []
    r = np.ones(n) if relevance is None else unit_interval(np.asarray(relevance, np.float64))

    # Focus: the fewest tokens that hold rho of the sum of phi; all of them, or none.
    phi = r**alpha * s
    order = sorted(range(n), key=lambda i: (-phi[i], i))
    held = np.concatenate([[0.0], np.cumsum(phi[order])])
    margins += np.abs(held - rho * held[-1]).tolist()
    k_focus = next(m for m in range(n + 1) if held[m] >= rho * held[-1])
    focus = order[:k_focus] if k_focus <= share * k + 1e-9 else []
    if focus:
        margins.append(phi[order[k_focus - 1]] - phi[order[k_focus]])

    # Scan: what is not covered yet, evenly and by relevance in the proportion `mix`.
    total = (r**gamma).sum()
    weight = (1 - mix) / n + mix * (r**gamma / total if total > 0 else np.full(n, 1 / n))
    cosine, picks = cosines(x), []
    while len(focus) + len(picks) < k:
        left = [j for j in range(n) if j not in focus + picks]
        gain = coverage_gain(cosine, weight, focus + picks)
        picks.append(first_best(gain, left, margins))

    # Refine: every other token goes to the nearest of the picks.
    kept, into, rows = sorted(focus + picks), [-1] * n, {}
    for i in range(n):
        if i not in kept and picks:
            into[i] = first_best(cosine[i], sorted(picks), margins)
    for j in kept:
        mass, row = 1.0, x[j].copy()
        for i in range(n):
            if into[i] == j:
                w = math.exp((cosine[i, j] - 1) / temperature)
                mass, row = mass + w, row + w * x[i]
        rows[j] = row / mass
    return Served(
        kept, focus, picks, into, np.array([rows[j] for j in kept]), k_focus,
        min((m for m in margins if m > _TIE), default=math.inf),
    )  # fmt: skip
