"""The three greedy loops as their papers write them: plain torch, from the definition, for reading
and for tests.

Arguments arrive checked and completed by `dispatch.py`; every backend has these three functions
with these parameters: `prefix` (B, P) and `count` (B,) say which tokens are chosen before the loop
starts (the first `count` entries of a row of `prefix`, in that order), `steps` (B,) how many to add
(never more than are left), `width` how many columns the answer has (-1 beyond a row's own picks).
"""

from __future__ import annotations

import torch

from .grid import snap


def first_best(score: torch.Tensor) -> int:
    """Lowest index of the largest value of a vector (torch.argmax does not promise which of equal
    ones it returns).
    """
    return int((score == score.max()).nonzero()[0])


def inverse_root(value: torch.Tensor) -> torch.Tensor:
    """1 / sqrt of float32 values, each step correctly rounded, to multiply with.

    On CPUs torch's own float32 root is off by a bit for every fifth value, and a division by a
    scalar becomes a multiplication on some devices.
    """
    return value.double().sqrt().float().reciprocal()


def farthest(
    similarity: torch.Tensor,
    prefix: torch.Tensor,
    count: torch.Tensor,
    steps: torch.Tensor,
    weight: torch.Tensor | None,
    width: int,
    emit_prefix: bool,
) -> torch.Tensor:
    """Farthest-point rounds: the token whose nearest chosen token is farthest away, by 1 -
    similarity.
    """
    batch, tokens, _ = similarity.shape
    picks = torch.full((batch, width), -1, dtype=torch.int64, device=similarity.device)
    for b in range(batch):
        chosen: list[int] = prefix[b, : int(count[b])].tolist()
        start = 0 if emit_prefix else len(chosen)
        for _ in range(int(steps[b])):
            # With nothing chosen yet no token is nearer than another: all distances count as 1.
            distance = (
                (1 - similarity[b, chosen]).amin(0) if chosen else torch.ones_like(similarity[b, 0])
            )
            score = distance if weight is None else distance * weight[b]
            score[chosen] = -torch.inf
            chosen.append(first_best(score))
        picks[b, : len(chosen) - start] = torch.tensor(chosen[start:], dtype=torch.int64)
    return picks


def dpp(kernel: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    """Fast greedy MAP of a determinantal point process: pick the largest variance, project it out
    of all others.

    Row s of `factor` is row s of the Cholesky factor of the picks, extended to all N tokens. Its
    sum over s runs in order, in float32, with each product rounded before it is added: other
    backends repeat exactly that.
    """
    batch, tokens, _ = kernel.shape
    picks = torch.empty((batch, steps), dtype=torch.int64, device=kernel.device)
    for b in range(batch):
        variance = kernel[b].diagonal().clone()
        factor: list[torch.Tensor] = []
        for t in range(steps):
            j = first_best(variance)
            picks[b, t] = j
            explained = torch.zeros_like(variance)
            for row in factor:
                explained = explained + row[j] * row
            # Nothing of variance eps or less is left to explain: what remains is rounding noise,
            # and dividing by its root would blow it up.
            is_noise = bool(variance[j] <= eps)
            inverse = inverse_root(variance[j])
            row = torch.zeros_like(variance) if is_noise else (kernel[b, j] - explained) * inverse
            factor.append(row)
            variance = variance - row * row
            variance[j] = -torch.inf
    return picks


def coverage(
    similarity: torch.Tensor,
    prefix: torch.Tensor,
    count: torch.Tensor,
    steps: torch.Tensor,
    covered: torch.Tensor,
    row_weight: torch.Tensor | None,
    candidate_weight: torch.Tensor | None,
    candidate_bonus: torch.Tensor | None,
    width: int,
) -> torch.Tensor:
    """Coverage rounds: the token that raises the sum over all tokens of their best similarity to a
    chosen one most.
    """
    batch, tokens, _ = similarity.shape
    picks = torch.full((batch, width), -1, dtype=torch.int64, device=similarity.device)
    similarity = snap(similarity)
    for b in range(batch):
        chosen: list[int] = prefix[b, : int(count[b])].tolist()
        cover = torch.cat([similarity[b, chosen], covered[b, None]]).amax(0)
        for t in range(int(steps[b])):
            rise = (
                (similarity[b] - cover[:, None]).clamp_min(0).double()
            )  # rise[i, j]: what candidate j adds to token i
            score = (rise if row_weight is None else rise * row_weight[b, :, None].double()).sum(0)
            if candidate_weight is not None:
                score = score * candidate_weight[b].double()
            if candidate_bonus is not None:
                score = score + candidate_bonus[b].double()
            score[chosen] = -torch.inf
            j = first_best(score)
            chosen.append(j)
            picks[b, t] = j
            cover = torch.maximum(cover, similarity[b, j])
    return picks
