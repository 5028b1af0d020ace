"""Focus-Scan-Refine as the paper writes it (arXiv 2602.05809v2): float64, plain loops, one image,
no production code.

`tightest` is the narrowest margin of any comparison made: a float32 implementation can only be
expected to decide the same where it is well above float32's rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Result:
    indices: list[int]
    is_focus: list[bool]
    rows: list[list[float]]
    merged_into: list[int]
    k_focus: int
    num_focus: int
    num_scan: int
    num_merged: int
    tightest: float = math.inf


@dataclass
class Margin:
    tightest: float = math.inf

    def note(self, gap: float) -> None:
        if gap > 0:  # a gap of 0 is a tie, settled by index
            self.tightest = min(self.tightest, gap)


@dataclass
class Settings:
    alpha: float = 3.0
    beta: float = 1.0
    rho: float = 0.9
    kappa: float = 1.0
    max_focus_share: float = 1.0
    refine: str = "phi"
    margin: Margin = field(default_factory=Margin)


def cos(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return dot / length if length > 0 else 0.0


def scaled(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 1.0 for v in values]


def best(candidates: list[int], score: dict[int, float], margin: Margin) -> int:
    """The candidate of highest score, ties to the lower index."""
    winner = candidates[0]
    for i in candidates[1:]:
        if score[i] > score[winner] or (score[i] == score[winner] and i < winner):
            winner = i
    for i in candidates:
        if i != winner:
            margin.note(score[winner] - score[i])
    return winner


def priority(
    saliency: list[float], relevance: list[float] | None, alpha: float, beta: float
) -> list[float]:
    """Equation (3), both scores scaled to [0, 1] first."""
    s = scaled(saliency)
    r = [1.0] * len(s) if relevance is None else scaled(relevance)
    return [r_i**alpha * s_i**beta for r_i, s_i in zip(r, s, strict=True)]


def ranking(phi: list[float], margin: Margin) -> list[int]:
    """pi: places by falling phi."""
    order = sorted(range(len(phi)), key=lambda i: (-phi[i], i))
    for a, b in zip(order, order[1:], strict=False):
        margin.note(phi[a] - phi[b])
    return order


def focus_count(phi: list[float], order: list[int], rho: float, margin: Margin) -> int:
    """Equation (4): the least k whose k best hold the share rho of Z, the sum of all."""
    z = sum(phi[i] for i in order)
    held = 0.0
    for k in range(len(order) + 1):
        margin.note(abs(held - rho * z))
        if held >= rho * z:
            return k
        held += phi[order[k]]
    raise AssertionError("unreachable: all of Z is held by all tokens")


def scan(features: list[list[float]], chosen: list[int], rounds: int, margin: Margin):
    """Equation (5); returns S in the order of picking."""
    n, anchors = len(features), []
    for _ in range(rounds):
        taken = chosen + anchors
        left = [i for i in range(n) if i not in taken]
        score = {i: min(1.0 - cos(features[i], features[j]) for j in taken) for i in left}
        anchors.append(best(left, score, margin))
    return anchors


def assign(
    features: list[list[float]], kept: list[int], anchors: list[int], kappa: float, margin: Margin
):
    """Equation (8): every discarded token's nearest anchor; then the M closest pairs (token,
    anchor).
    """
    discarded = [i for i in range(len(features)) if i not in kept]
    if not anchors:
        return []
    nearest, closeness = {}, {}
    for i in discarded:
        similarity = {j: cos(features[i], features[j]) for j in anchors}
        nearest[i] = best(sorted(anchors), similarity, margin)
        closeness[i] = similarity[nearest[i]]
    closest = sorted(discarded, key=lambda i: (-closeness[i], i))
    for a, b in zip(closest, closest[1:], strict=False):
        margin.note(closeness[a] - closeness[b])
    return [
        (i, nearest[i])
        for i in closest[: min(math.floor(kappa * len(anchors) + 0.5), len(discarded))]
    ]


def merge(
    features: list[list[float]], pairs: list[tuple[int, int]], weight: list[float]
) -> dict[int, list[float]]:
    """Equation (9), one merge after the other with running weights; 0/0 changes nothing."""
    rows = {j: list(features[j]) for _, j in pairs}
    w = {j: weight[j] for _, j in pairs}
    for i, j in pairs:
        total = w[j] + weight[i]
        if total > 0:
            rows[j] = [
                (w[j] * a + weight[i] * b) / total
                for a, b in zip(rows[j], features[i], strict=True)
            ]
        w[j] = total
    return rows


def fsr(features, saliency, relevance, budget: int, **options) -> Result:
    """All of it for one image; lists of floats in, budget < N."""
    how = Settings(**options)
    phi = priority(saliency, relevance, how.alpha, how.beta)
    order = ranking(phi, how.margin)
    k_focus = focus_count(phi, order, how.rho, how.margin)
    num_focus = min(k_focus, budget, max(1, math.floor(how.max_focus_share * budget + 1e-9)))

    focus, anchors = order[:num_focus], []
    if not focus:
        anchors = [max(range(len(phi)), key=lambda i: (phi[i], saliency[i], -i))]
    rounds = budget - num_focus - len(anchors)
    anchors = anchors + scan(features, focus + anchors, rounds, how.margin)

    pairs = (
        assign(features, focus + anchors, anchors, how.kappa, how.margin)
        if how.refine != "off"
        else []
    )
    rows = merge(features, pairs, phi)

    indices = sorted(focus + anchors)
    merged_into = [-1] * len(features)
    for i, j in pairs:
        merged_into[i] = j
    return Result(
        indices=indices,
        is_focus=[i in focus for i in indices],
        rows=[rows.get(i, features[i]) for i in indices],
        merged_into=merged_into,
        k_focus=k_focus,
        num_focus=num_focus,
        num_scan=len(anchors),
        num_merged=len(pairs),
        tightest=how.margin.tightest,
    )
