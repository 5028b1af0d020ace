"""The three greedy loops in torch operations of fixed shape: where the Triton kernels cannot run.

Every image takes the same number of steps and what a row does not need is thrown away, so nothing
is read back from the device and a CUDA graph can record the loop. Parameters as in `dispatch.py`.
Indices are those of the other backends, except that `dpp` adds in another order and may differ
where two variances agree to a few float32 roundings.
"""

from __future__ import annotations

import torch

from .grid import snap


def _pick(score: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(B,) lowest index of each row's largest value; torch.argmax promises nothing about ties."""
    return torch.where(score == score.amax(-1, keepdim=True), places, places.shape[0] - 1).amin(-1)


def _row(matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, N) row `index[b]` of each matrix (B, M, N)."""
    return matrix.gather(1, index[:, None, None].expand(-1, 1, matrix.shape[2])).squeeze(1)


def _is_chosen(prefix: torch.Tensor, count: torch.Tensor, tokens: int) -> torch.Tensor:
    """(B, N) bool: is among the first `count` of `prefix`, which later entries may repeat."""
    inside = torch.arange(prefix.shape[1], device=prefix.device) < count[:, None]
    seen = torch.zeros((prefix.shape[0], tokens), dtype=torch.int32, device=prefix.device)
    return seen.scatter_add_(1, prefix, inside.int()) > 0


def farthest(
    similarity: torch.Tensor, prefix: torch.Tensor, count: torch.Tensor, budget: int
) -> torch.Tensor:
    """Farthest-point rounds with a running minimum of distances, `budget` steps for every row."""
    batch, tokens, _ = similarity.shape
    places = torch.arange(tokens, device=similarity.device)
    chosen = _is_chosen(prefix, count, tokens)
    nearest = (1 - similarity).masked_fill_(~chosen[:, :, None], torch.inf).amin(1)
    nearest = nearest.masked_fill_(chosen, -torch.inf)
    picks = torch.empty((batch, budget), dtype=torch.int64, device=similarity.device)
    for t in range(budget):
        given = prefix[:, min(t, prefix.shape[1] - 1)]
        j = torch.where(t < count, given, _pick(nearest, places))
        picks[:, t] = j
        # A given token was counted in above: once more changes nothing.
        nearest = torch.minimum(nearest, 1 - _row(similarity, j)).scatter_(
            1, j[:, None], -torch.inf
        )
    return picks


def dpp(kernel: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    """Fast greedy MAP of a determinantal point process, by incremental Cholesky rows."""
    batch, tokens, _ = kernel.shape
    places = torch.arange(tokens, device=kernel.device)
    variance = kernel.diagonal(dim1=1, dim2=2).clone()
    factor = torch.zeros((batch, steps, tokens), dtype=kernel.dtype, device=kernel.device)
    picks = torch.empty((batch, steps), dtype=torch.int64, device=kernel.device)
    for t in range(steps):
        j = _pick(variance, places)
        picks[:, t] = j
        best = variance.gather(1, j[:, None])
        # Products and a sum, not a matrix product: that could run in TF32, with three digits.
        column = factor[:, :t].gather(2, j[:, None, None].expand(-1, t, 1))
        explained = (factor[:, :t] * column).sum(1)
        is_noise = best <= eps
        # 1 / sqrt, each step correctly rounded: on CPUs torch's own float32 root is off by a bit
        # for every fifth value, and some devices turn dividing by a scalar into multiplying.
        inverse = torch.where(is_noise, 1.0, best).double().sqrt().float().reciprocal()
        row = (_row(kernel, j) - explained) * inverse
        row = row.masked_fill(is_noise, 0.0)
        factor[:, t] = row
        variance = (variance - row * row).scatter_(1, j[:, None], -torch.inf)
    return picks


def coverage(
    similarity: torch.Tensor,
    prefix: torch.Tensor,
    count: torch.Tensor,
    steps: torch.Tensor,
    row_weight: torch.Tensor | None,
    candidate_weight: torch.Tensor | None,
    candidate_bonus: torch.Tensor | None,
    width: int,
) -> torch.Tensor:
    """Coverage rounds; every step recomputes all gains."""
    batch, tokens, _ = similarity.shape
    places = torch.arange(tokens, device=similarity.device)
    similarity = snap(similarity)
    chosen = _is_chosen(prefix, count, tokens)
    cover = similarity.masked_fill(~chosen[:, :, None], -torch.inf).amax(1).clamp_min_(0)
    picks = torch.full((batch, width), -1, dtype=torch.int64, device=similarity.device)
    for t in range(width):
        rise = (similarity - cover[:, :, None]).clamp_min_(0)
        if row_weight is None:
            score = rise.sum(1, dtype=torch.float64)
        else:
            score = (rise.double() * row_weight[:, :, None].double()).sum(1)
        if candidate_weight is not None:
            score = score * candidate_weight.double()
        if candidate_bonus is not None:
            score = score + candidate_bonus.double()
        j = _pick(score.masked_fill_(chosen, -torch.inf), places)
        picks[:, t] = torch.where(t < steps, j, -1)
        chosen = chosen.scatter(1, j[:, None], True)
        cover = torch.maximum(cover, _row(similarity, j))
    return picks
