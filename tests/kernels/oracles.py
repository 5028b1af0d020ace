"""The three selection rules written from their definitions, and the matrices that tests run on.

Once in float64 numpy, for what is to be picked; once in float32 torch, one step and one image at a
time, with the signatures of the public loops, for what every backend is to pick bit for bit.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from fsr_vllm import kernels
from fsr_vllm.kernels.grid import snap, snap_weights

# Same examples in every run: a failure is a change of the code.
quick = settings(max_examples=150, deadline=None, derandomize=True)

KINDS = ("random", "clustered", "duplicates", "lattice", "ring", "constant", "identity", "opposite")


def features(kind: str, tokens: int, seed: int) -> torch.Tensor:
    """(N, D) unit rows: each kind breaks another kind of greedy loop."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 12, generator=generator)
    if kind == "clustered":  # near ties inside a cluster
        centers = torch.randn(4, 12, generator=generator)
        x = 4 * centers[torch.randint(4, (tokens,), generator=generator)] + 0.1 * x
    elif kind == "duplicates":  # exact ties, rank far below N
        x = x[torch.randint(max(1, tokens // 4), (tokens,), generator=generator)]
    elif kind == "lattice":  # few distinct similarities: equal sums of different addends
        x = torch.randint(-1, 2, (tokens, 4), generator=generator) + torch.tensor(
            [0.0, 0.0, 0.0, 0.5]
        )
    elif kind == "ring":  # every token sees the same similarities in another order
        angle = torch.arange(tokens) * (2 * torch.pi / tokens)
        x = torch.stack([angle.cos(), angle.sin()], 1)
    elif kind == "constant":
        x = torch.ones(tokens, 3)
    elif kind == "identity":  # all distances equal
        x = torch.eye(tokens)
    elif kind == "opposite":  # cosines at both ends
        x = x[:1] * (1 - 2 * torch.randint(2, (tokens, 1), generator=generator))
    return torch.nn.functional.normalize(x, dim=-1)


def matrix(kind: str, tokens: int, seed: int, batch: int = 1) -> torch.Tensor:
    """(B, N, N) float32 cosines."""
    x = torch.stack([features(kind, tokens, seed + 1000 * b) for b in range(batch)])
    return x @ x.mT


def lopsided(tokens: int, seed: int, batch: int = 1) -> torch.Tensor:
    """(B, N, N) not quite symmetric, as a GEMM may leave it: which of a row and a column is read
    then matters.
    """
    noise = torch.randn(batch, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    return matrix("random", tokens, seed, batch) + 0.05 * noise


def coarse(values: torch.Tensor, step: float) -> torch.Tensor:
    """Rounded to multiples of a power of two: float32 arithmetic on them is exact, and ties are
    many.
    """
    return (values / step).round() * step


cases = st.tuples(st.sampled_from(KINDS), st.integers(1, 24), st.integers(0, 999))
fractions = st.integers(0, 24)


def draws(tokens: int, seed: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (B, N) in quarters, zeros among them, and a random choice of about a quarter of the
    tokens (B, N).
    """
    generator = torch.Generator().manual_seed(seed + 7)
    weight = torch.randint(0, 5, (batch, tokens), generator=generator) / 4
    return weight, torch.rand(batch, tokens, generator=generator) < 0.25


def _best(score: dict[int, float]) -> int:
    """Lowest index among the largest values."""
    return min(score, key=lambda i: (-score[i], i))


def farthest(similarity, chosen: list[int], steps: int) -> list[int]:
    """argmax over i not in A of min over j in A of (1 - S_ij); with A empty every minimum counts
    as 1.
    """
    s = np.asarray(similarity, dtype=np.float64)
    taken, picks = list(chosen), []
    for _ in range(min(steps, len(s) - len(taken))):
        score = {
            i: min((1 - s[i, j] for j in taken), default=1.0)
            for i in range(len(s))
            if i not in taken
        }
        picks.append(_best(score))
        taken.append(picks[-1])
    return picks


def coverage(
    similarity, steps: int, rows=None, candidates=None, bonus=None, chosen=()
) -> list[int]:
    """argmax over j not in A of a_j sum_i w_i max(0, S_ij - c_i) + b_j, c_i = max_A(0, S_ij)."""
    s = np.asarray(similarity, dtype=np.float64)
    ones, zeros = np.ones(len(s)), np.zeros(len(s))
    w = ones if rows is None else np.asarray(rows, dtype=np.float64)
    a = ones if candidates is None else np.asarray(candidates, dtype=np.float64)
    b = zeros if bonus is None else np.asarray(bonus, dtype=np.float64)
    taken, picks = list(chosen), []
    for _ in range(min(steps, len(s) - len(taken))):
        c = np.max(np.vstack([zeros, s[taken]]), axis=0)
        score = {
            j: float(a[j] * np.sum(w * np.maximum(0, s[:, j] - c)) + b[j])
            for j in range(len(s))
            if j not in taken
        }
        picks.append(_best(score))
        taken.append(picks[-1])
    return picks


def dpp_variances(kernel, taken: list[int]) -> np.ndarray:
    """det L[A + i] / det L[A] for every i not in A, -inf in A; A must have a determinant."""
    full = np.asarray(kernel, dtype=np.float64)
    variance = np.diag(full).copy()
    if taken:
        cross = full[taken]
        variance -= np.sum(cross * np.linalg.solve(full[np.ix_(taken, taken)], cross), axis=0)
        variance[taken] = -np.inf
    return variance


def first_best(score: torch.Tensor) -> int:
    """Lowest index of the largest value; torch.argmax promises nothing about ties."""
    return int((score == score.max()).nonzero()[0])


def farthest_from_prefix(similarity, order, count, budget) -> torch.Tensor:
    """The token whose nearest chosen token is farthest away, by 1 - similarity."""
    picks = []
    for b, sim in enumerate(similarity):
        given = int(count if isinstance(count, int) else count[b])
        chosen = order[b, : min(max(given, 1), budget)].tolist()
        while len(chosen) < budget:
            score = (1 - sim[chosen]).amin(0)
            score[chosen] = -torch.inf
            chosen.append(first_best(score))
        picks.append(chosen)
    return torch.tensor(picks)


def dpp_greedy(kernel: torch.Tensor, k: int) -> torch.Tensor:
    """The largest variance is picked and projected out of all others.

    Row s of `factor` is row s of the Cholesky factor of the picks, extended to all N tokens. Its
    sum over s runs in order, in float32, with each product rounded before it is added.
    """
    picks = torch.empty((len(kernel), k), dtype=torch.int64)
    for b, own in enumerate(kernel):
        variance, factor = own.diagonal().clone(), []
        for t in range(k):
            picks[b, t] = j = first_best(variance)
            explained = torch.zeros_like(variance)
            for row in factor:
                explained = explained + row[j] * row
            is_noise = bool(variance[j] <= np.float32(1e-12))
            inverse = variance[j].double().sqrt().float().reciprocal()
            row = torch.zeros_like(variance) if is_noise else (own[j] - explained) * inverse
            factor.append(row)
            variance = variance - row * row
            variance[j] = -torch.inf
    return picks


def coverage_greedy(
    similarity, steps, row_weight=None, candidate_weight=None, selected=None, max_steps=None, *,
    candidate_bonus=None,
) -> torch.Tensor:  # fmt: skip
    """The token that raises the sum of all tokens' best similarity to a chosen one most."""
    width = steps if max_steps is None else max_steps
    picks = torch.full((len(similarity), width), -1)
    rows = None if row_weight is None else snap_weights(row_weight)
    for b, sim in enumerate(map(snap, similarity)):
        chosen = [] if selected is None else selected[b].nonzero()[:, 0].tolist()
        cover = torch.cat([sim[chosen], torch.zeros_like(sim[:1])]).amax(0)
        rounds = min(int(steps if isinstance(steps, int) else steps[b]), width)
        for t in range(min(rounds, len(sim) - len(chosen))):
            rise = (sim - cover[:, None]).clamp_min(0).double()  # what candidate j adds to token i
            score = (rise if rows is None else rise * rows[b, :, None].double()).sum(0)
            if candidate_weight is not None:
                score = score * candidate_weight[b].double()
            if candidate_bonus is not None:
                score = score + candidate_bonus[b].clamp(-1e30, 1e30).double()
            score[chosen] = -torch.inf
            picks[b, t] = j = first_best(score)
            chosen.append(j)
            cover = torch.maximum(cover, sim[j])
    return picks


def implementations(name: str) -> dict:
    """The loop of this name as written here, and with each backend that a CPU can run."""
    public = getattr(kernels, name)
    backends = {key: partial(public, backend=key) for key in ("torch", "masked")}
    return {"literal": globals()[name], **backends}


def each(loops: dict) -> pytest.MarkDecorator:
    """Run a test with every one of these as `loop`."""
    return pytest.mark.parametrize("loop", loops.values(), ids=loops)
