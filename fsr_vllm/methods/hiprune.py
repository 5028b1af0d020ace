"""HiPrune: anchors of an object-centric layer, their neighbours, and the best of a late layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Method, Selection, VisualTokens, option, topk_stable
from .ops import square_grid


@dataclass
class HiPrune(Method):
    """Anchors by the attention tokens receive in an object-centric layer, their neighbours, the
    rest by a late layer.

    Both maps are attention *received*: mean over the heads and over all queries, [CLS] included, of
    the weight on each patch. `received` is that of the layer whose output the model reads,
    `shallow_received` that of the authors' layer 9 of CLIP ViT-L, which they count from 1 (16 of
    Qwen2.5-VL's tower). There are round(alpha * K / 5) anchors, halves to the even number, each
    with the tokens left, right, above and below.

    edges="code", as published: a neighbour is the place one or a row's length before or behind, and
    what lies outside the image becomes its first or last token; so the neighbour beyond the end of
    a row is the start of the next. edges="grid": it does not exist. Anchors go first, then
    neighbours in the order of their anchors, then the others by `received`: if anchors and
    neighbours are more than K, which takes a large alpha and ends the published program, the last
    neighbours are left out. Without a grid N = side * side is taken as a square one, any other N as
    one row.
    """

    name: ClassVar[str] = "hiprune"
    shallow_layer: ClassVar[int] = 8
    needs: ClassVar[tuple[str, ...]] = ("received", "shallow_received")
    uses: ClassVar[tuple[str, ...]] = ("grid",)
    paper: ClassVar[str] = (
        "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models"
        " (arXiv 2508.00553)"
    )
    license: ClassVar[str] = "MIT"

    alpha: float = option(0.1, low=0, high=1, doc="share of K for anchors and their neighbours")
    edges: str = option(
        "code", choices=("code", "grid"), doc="neighbours beyond an edge: the code's, or none"
    )

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        shallow, deep = (
            tokens.require("shallow_received").float(),
            tokens.require("received").float(),
        )
        b, n = deep.shape
        anchors = topk_stable(shallow, round(k * self.alpha / 5))
        near = _neighbours(anchors, tokens.grid or square_grid(n), wrap=self.edges == "code")
        first = torch.cat([anchors, near.flatten(1)], 1)
        turn = torch.arange(first.shape[1], 0, -1, device=deep.device).expand_as(
            first
        )  # the earlier, the higher
        rank = torch.zeros(b, n, dtype=torch.int64, device=deep.device).scatter_reduce_(
            1, first, turn, "amax"
        )
        order = topk_stable(deep, n)
        return Selection(order.gather(1, topk_stable(rank.gather(1, order), k)))


def _neighbours(places: Tensor, grid: tuple[int, int], wrap: bool) -> Tensor:
    """Left, right, above and below of places (B, A), (B, A, 4); without wrap the place itself where
    there is none.
    """
    h, w = grid
    step = torch.stack([places - 1, places + 1, places - w, places + w], -1)
    if wrap:
        return step.clamp(0, h * w - 1)
    row, column = places // w, places % w
    inside = torch.stack([column > 0, column < w - 1, row > 0, row < h - 1], -1)
    return torch.where(inside, step, places[..., None])
