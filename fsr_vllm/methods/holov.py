"""HoloV: budgets for parts of the image, by attention and by how much tokens vary there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Method, Selection, VisualTokens, cosine_similarity, indices_of, option

_EPSILON = 1e-6  # the authors': beside a crop's mean spread, which it is divided by


@dataclass
class HoloV(Method):
    """Cuts the raster into crops, shares K among them by their mean score, and keeps the best of
    each.

    Score = saliency + gamma * V, with V the spread of a token's cosines to its crop, scaled to the
    crop's own mean saliency. Crops are runs of the raster sequence, not windows, as in the
    published code; where the division leaves a remainder, the first ones are one longer. Of a crop
    with m tokens the cosines have a zeroed diagonal, which stays in the sum of V = sum_j (cos_ij -
    mean_i)^2 / (m - 1), as in the code. Shares are in proportion to the mean score of a crop, to
    the power tau, and rounded down; what is left goes to the crops of largest share, one each.

    Paper and code differ in what a crop keeps. rule="code": its best by saliency alone.
    rule="paper": its best by score. Where a share exceeds its crop, the code filled up with rows of
    zeros; here, as the paper has it, the excess goes to the crops with room, in proportion to their
    scores. A crop of one token scores like any other, where the code leaves out its factor of 1000
    on saliency, which otherwise cancels out. gamma is 0.09 in the code and has no value in the
    paper. For Qwen2.5-VL the code takes 1.778 * N / K crops (crops=0) and leaves scores in window
    order, which is the caller's to map back.
    """

    name: ClassVar[str] = "holov"
    needs: ClassVar[tuple[str, ...]] = ("saliency",)
    paper: ClassVar[str] = (
        'Don\'t Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention'
        " (arXiv 2510.02912)"
    )
    license: ClassVar[str] = "Apache-2.0"

    rule: str = option(
        "code",
        choices=("code", "paper"),
        doc="within a crop: the best by saliency alone, or by score",
    )
    crops: int = option(16, low=0, doc="number of crops, at most N; 0 = max(1, int(1.778 * N / K))")
    gamma: float = option(0.09, low=0, doc="weight of the spread beside saliency")
    tau: float = option(
        1.0, low=0, doc="exponent of a crop's score in its share of K (1 in the code)"
    )

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        saliency, device = tokens.require("saliency").float(), tokens.features.device
        b, n = saliency.shape
        crops = min(self.crops or max(1, int(1.778 * n / k)), n)
        base, longer = divmod(n, crops)
        most = base + (longer > 0)

        # Crops as rows of equal length; the last place of a shorter one is void.
        crop = torch.arange(crops, device=device)
        size, start = base + (crop < longer), crop * base + crop.clamp(max=longer)
        place = start[:, None] + torch.arange(most, device=device)
        void = (place >= (start + size)[:, None]).expand(b, -1, -1)
        place = place.clamp(max=n - 1).flatten()
        rows = tokens.features[:, place].view(b, crops, most, -1).masked_fill(void[..., None], 0)
        attention = saliency[:, place].view(b, crops, most).masked_fill(void, 0)

        spread = _spread(rows, size, void)
        scale = attention.abs().sum(-1) / (
            spread.sum(-1) + _EPSILON * size
        )  # a ratio of means over the crop
        score = attention + self.gamma * spread * scale[..., None]
        quota = _shares((score.sum(-1) / size).double().clamp(min=0), self.tau, size, k)

        best = score if self.rule == "paper" else attention
        order = (
            best.masked_fill(void, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        )
        kept = order.argsort(-1) < quota[..., None]
        token = torch.arange(n, device=device)
        owner = torch.where(token < longer * most, token // most, (token - longer) // base)
        return Selection(indices_of(kept.flatten(1)[:, owner * most + token - start[owner]], k))


def _spread(rows: Tensor, size: Tensor, void: Tensor) -> Tensor:
    """V of every token of rows (B, C, m, D) within its crop, (B, C, m); 0 at void places and in a
    crop of one.
    """
    similarity = cosine_similarity(rows.flatten(0, 1)).view(
        *void.shape, -1
    )  # a void row is zero, as are its cosines
    similarity.diagonal(dim1=-2, dim2=-1).zero_()
    others = (size - 1).clamp(min=1)[:, None]
    mean = similarity.sum(-1) / others
    squares = (similarity - mean[..., None]).square().masked_fill(void[:, :, None, :], 0)
    return (squares.sum(-1) / others).masked_fill(void, 0)


def _shares(score: Tensor, tau: float, size: Tensor, k: int) -> Tensor:
    """k shared among crops as score^tau, at most size each, what rounding leaves to the largest:
    (B, C), sum k.

    Handing on again and again what a share exceeds its crop ends where the share is min(size, t *
    weight) for one t: the crops that are full are those of least size / weight. A weight of 0
    counts only when all others are full.
    """
    top = score.amax(-1, keepdim=True)
    weight = (
        torch.where(top > 0, score / torch.where(top > 0, top, 1.0), 1.0).pow(tau).clamp(min=1e-9)
    )
    capacity, order = (size / weight).sort(dim=-1, stable=True)
    size = size.expand_as(order)
    filled = size.gather(1, order)
    filled = filled.cumsum(-1) - filled
    open_weight = weight.gather(1, order).flip(-1).cumsum(-1).flip(-1)
    level = (k - filled) / open_weight
    level = level.gather(1, (level <= capacity).int().argmax(-1, keepdim=True))
    share = torch.minimum(size.double(), level * weight)

    floor = share.floor()
    missing = k - floor.sum(-1, keepdim=True)
    with_room = torch.where(floor < size, weight, -1.0)
    turn = with_room.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    return (floor + (turn < missing)).long()
