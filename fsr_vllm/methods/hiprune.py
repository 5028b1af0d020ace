"""HiPrune: anchors of an early layer, their neighbours, and the best of a late layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Method, Selection, VisualTokens, option, topk_stable
from .ops import square_grid


@dataclass
class HiPrune(Method):
    """Anchors by attention of an object-centric layer, their four neighbours, and the rest by late attention.

    shallow_saliency is that of layer 9 of CLIP ViT-L (16 of Qwen2.5-VL's tower), saliency that of a late layer. There
    are floor(alpha * K / 5 + 0.5) anchors, each with the tokens above, left, right and below. A neighbour outside the
    grid does not exist, where the published code takes a clamped index, or one from the other end of the next row.
    Anchors go first, then neighbours in the order of their anchors, then the others by saliency: so if anchors and
    neighbours are more than K, which takes a large alpha, the last neighbours are left out. Without a grid
    N = side * side is taken as a square one, any other N as one row.
    """

    name: ClassVar[str] = "hiprune"
    shallow_layer: ClassVar[int] = 9
    needs: ClassVar[tuple[str, ...]] = ("saliency", "shallow_saliency")
    uses: ClassVar[tuple[str, ...]] = ("grid",)
    paper: ClassVar[str] = (
        "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models"
        " (arXiv 2508.00553)"
    )
    licence: ClassVar[str] = "MIT"

    alpha: float = option(0.1, low=0, high=1, doc="share of K for anchors and their neighbours")

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        shallow, deep = tokens.require("shallow_saliency").float(), tokens.require("saliency").float()
        b, n = deep.shape
        anchors = topk_stable(shallow, math.floor(self.alpha * k / 5 + 0.5))
        first = torch.cat([anchors, _neighbours(anchors, tokens.grid or square_grid(n)).flatten(1)], 1)
        turn = torch.arange(first.shape[1], 0, -1, device=deep.device).expand_as(first)  # the earlier, the higher
        rank = torch.zeros(b, n, dtype=torch.int64, device=deep.device).scatter_reduce_(1, first, turn, "amax")
        order = topk_stable(deep, n)
        return Selection(order.gather(1, topk_stable(rank.gather(1, order), k)))


def _neighbours(places: Tensor, grid: tuple[int, int]) -> Tensor:
    """Above, left, right and below of places (B, A), (B, A, 4); the place itself where that is outside the grid."""
    h, w = grid
    row, column = places // w, places % w
    inside = torch.stack([row > 0, column > 0, column < w - 1, row < h - 1], -1)
    step = torch.stack([places - w, places - 1, places + 1, places + w], -1)
    return torch.where(inside, step, places[..., None])
