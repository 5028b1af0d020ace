"""Control: average pooling to exactly K regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Fidelity, Method, Selection, VisualTokens
from .ops import regions, square_grid


@dataclass
class AvgPool(Method):
    """Mean of each of K rectangles that partition the grid (a control, no paper).

    Without a grid N = side * side is taken as a square one, any other N as a sequence cut into K
    runs. The place of a pooled row is the most salient token of its rectangle where saliency is
    given, else the first.
    """

    name: ClassVar[str] = "avgpool"
    uses: ClassVar[tuple[str, ...]] = ("grid", "saliency")
    license: ClassVar[str] = "none needed"
    fidelity: ClassVar[Fidelity] = "control"

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        features = tokens.features
        b, n, d = features.shape
        region = regions(k, tokens.grid or square_grid(n), features.device)
        size = torch.zeros(k, dtype=torch.int64, device=features.device).index_add_(
            0, region, torch.ones_like(region)
        )

        precise = torch.promote_types(features.dtype, torch.float32)
        rows = torch.zeros(b, k, d, dtype=precise, device=features.device)
        rows = rows.index_add_(1, region, features.to(precise)) / size[:, None]

        rank = (
            torch.zeros(b, n, device=features.device)
            if tokens.saliency is None
            else tokens.saliency
        )
        order = rank.sort(
            dim=-1, descending=True, stable=True
        ).indices  # best first, then by region: its best is first
        order = order.gather(1, region[order].sort(dim=-1, stable=True).indices)
        place = order[:, size.cumsum(0) - size]

        merged_into = place[:, region]
        merged_into = merged_into.scatter(1, place, -1)
        merged = torch.full((b,), n - k, device=features.device)
        return Selection(place, rows=rows, merged_into=merged_into, num_merged=merged)
