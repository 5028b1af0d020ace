"""VFlowOpt, the stage before the language model: importance by attention, and what is pruned
recycled cell by cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import (
    Fidelity,
    Method,
    Selection,
    VisualTokens,
    gather_rows,
    mask_of,
    option,
    topk_stable,
)
from .ops import square_grid


@dataclass
class VFlowOpt(Method):
    """What the most attended tokens attend to is kept; the rest is averaged within the cells of a
    coarse grid.

    `attention` is the head mean of one layer. The important tokens are those that receive more than
    `threshold` times the mean attention (if none does, the one that receives most, a case left
    open); the importance I of a token is the mean attention they give it. The tokens of highest I
    are kept. Those pruned that lie in the same cell, a square of side `cell` tokens, become one
    row: their mean weighted by I, at the place of the highest I among them. Where weights sum to 0
    that token's row is left as it is.

    Exact K: each pruned cell costs one row, so the published count is only about K. Keeping one
    token more adds a row, or none if that token was alone in its cell; so there is a number m of
    kept tokens at which tokens and cells make exactly K, and every such m gives the same rows. If
    there are more cells than K, none is kept by itself, and only the K cells whose best token has
    the highest I give a row.

    The progressive dropping inside the language model, at two layers by the same ranking, is left
    out, as is the term of patch entropy, whose weight is 0 in all published settings. Settings
    (threshold, cell) that the authors found for LLaVA-OneVision-7B: (28.68, 11.76) to keep 50 %,
    (34.76, 15.58) for 25 %, (39.26, 17.39) for 10 %. Without a grid N = side * side is taken as a
    square one, any other N as one row.
    """

    name: ClassVar[str] = "vflowopt"
    needs: ClassVar[tuple[str, ...]] = ("attention",)
    uses: ClassVar[tuple[str, ...]] = ("grid",)
    paper: ClassVar[str] = (
        "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization"
        " (arXiv 2508.05211)"
    )
    license: ClassVar[str] = "CC BY-NC 4.0"
    fidelity: ClassVar[Fidelity] = "stage-1"

    threshold: float = option(
        34.76, low=0, doc="attention received, in means, that makes a token important"
    )
    cell: float = option(
        15.58, low=1, doc="side of a cell in which pruned tokens are merged, in tokens"
    )

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        features, importance = (
            tokens.features,
            _importance(tokens.require("attention").float(), self.threshold),
        )
        b, n, _ = features.shape
        token = torch.arange(n, device=features.device)
        cell, cells = _cells(tokens.grid or square_grid(n), self.cell, features.device)
        cell = cell.expand(b, n)
        order = topk_stable(importance, n)
        rank = torch.empty_like(order).scatter_(1, order, token.expand(b, n))

        # With the m best kept, the cells that still hold a token are those whose last one has rank
        # >= m.
        last = torch.zeros(b, cells, dtype=torch.int64, device=features.device).scatter_reduce_(
            1, cell, rank, "amax"
        )
        ends = torch.zeros_like(order).scatter_add_(1, last, torch.ones_like(last))
        filled = ends.flip(1).cumsum(1).flip(1)
        pruned = rank >= (token + filled < k).sum(-1, keepdim=True)
        first = (
            torch.full_like(last, n)
            .scatter_reduce_(1, cell, torch.where(pruned, rank, n), "amin")
            .gather(1, cell)
        )
        indices = (
            torch.where(pruned & (rank != first), n, rank).sort(dim=-1, stable=True).indices[:, :k]
        )

        kept = mask_of(indices, n)
        anchor = order.gather(1, first.clamp(max=n - 1))
        into = torch.where(pruned & kept.gather(1, anchor), anchor, -1)  # of an anchor: itself
        precise = features.to(torch.promote_types(features.dtype, torch.float32))
        # Image by image: a batched product may round differently, and then a batch would not equal
        # its images.
        parts = zip(precise, importance.to(precise.dtype), indices, into, strict=True)
        recycled = torch.stack([_recycle(*part) for part in parts])
        merged_into = into.masked_fill(kept, -1)
        alone = ~(merged_into[:, None] == indices[..., None]).any(-1, keepdim=True)
        rows = torch.where(alone, gather_rows(precise, indices), recycled)
        return Selection(
            indices, rows=rows, merged_into=merged_into, num_merged=(merged_into >= 0).sum(-1)
        )


def _importance(attention: Tensor, threshold: float) -> Tensor:
    """Mean attention (B, N) that each token gets from the important ones; attention (B, N, N)."""
    received = attention.mean(1)
    important = received > threshold * received.mean(-1, keepdim=True)
    most = torch.zeros_like(important).scatter_(1, received.argmax(-1, keepdim=True), True)
    giver = torch.where(important.any(-1, keepdim=True), important, most)
    return (attention * giver[..., None]).sum(1) / giver.sum(-1, keepdim=True)


def _cells(grid: tuple[int, int], side: float, device: torch.device) -> tuple[Tensor, int]:
    """The cell (N,) each token of the grid lies in, and the number of cells."""
    # By a tensor: a GPU divides by a number through its reciprocal, and then 49 / 49 may come out
    # below 1.
    divisor = torch.full((), side, dtype=torch.float64, device=device)
    row, column = ((torch.arange(edge, device=device) / divisor).floor().long() for edge in grid)
    across = int((grid[1] - 1) / side) + 1
    return (row[:, None] * across + column).flatten(), across * (int((grid[0] - 1) / side) + 1)


def _recycle(features: Tensor, weight: Tensor, indices: Tensor, into: Tensor) -> Tensor:
    """Rows (K, D): the weighted mean of all that went into each place, or the place's own row if
    weights are 0.
    """
    shares = torch.where(into == indices[:, None], weight, 0.0)
    total = shares.sum(-1, keepdim=True)
    shares = shares / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, shares @ features, features[indices])
