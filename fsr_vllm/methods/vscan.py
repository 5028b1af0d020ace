"""VScan, the stage before the language model: two layers choose, the rest is merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import (
    Method,
    Selection,
    VisualTokens,
    each_image,
    indices_of,
    mask_of,
    normalise,
    option,
    square_grid,
    topk_stable,
)


@dataclass
class VScan(Method):
    """Half by windows of an early layer, half by a late one; the rest is merged into them.

    shallow_saliency is that of block 5 of CLIP ViT-L (of Qwen2.5-VL's tower: its first block of
    full attention). Each of the W windows gives its floor(floor(K / 2) / W) best, or all it has;
    the rest of K are the best of the others by saliency. Every discarded token goes to the kept one
    of highest cosine, and a kept token becomes the plain mean of itself and those.

    Only this first stage runs before the language model. The second, which drops tokens at one of
    its middle layers by the prompt's attention, does not fit a fixed number of tokens; the
    published averages spend more than K before that layer and fewer after it. Windows at the lower
    and right edge are smaller where the grid is no multiple of theirs; the authors' Qwen2.5-VL
    variant, which rounds the windows' shares up, is left out. Without a grid N = side * side is
    taken as a square one, any other N as one row.
    """

    name = "vscan"
    shallow_layer = 5
    needs = ("saliency", "shallow_saliency")
    uses = ("grid",)
    paper = (
        "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models "
        "(arXiv 2505.22654)"
    )
    license = "MIT"
    fidelity = "stage-1"

    window: int = option(6, low=1, doc="side of a window, in tokens")
    merge: bool = option(True, doc="merge discarded tokens into kept ones")

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        shallow, deep = (
            tokens.require("shallow_saliency").float(),
            tokens.require("saliency").float(),
        )
        b, n = deep.shape
        local, count = _best_of_windows(shallow, k // 2, tokens.grid or square_grid(n), self.window)
        late = topk_stable(deep.masked_fill(local, -torch.inf), k - count)
        kept = indices_of(local | mask_of(late, n), k)
        if not self.merge:
            return Selection(kept)
        features = tokens.features
        slot = each_image(_nearest, normalise(features), kept)
        precise = features.to(torch.promote_types(features.dtype, torch.float32))
        merged_into = kept.gather(1, slot).scatter(1, kept, -1)
        merged = torch.full((b,), n - k, device=deep.device)
        rows = each_image(_means, precise, kept, slot)
        return Selection(kept, rows=rows, merged_into=merged_into, num_merged=merged)


def _best_of_windows(
    score: Tensor, half: int, grid: tuple[int, int], side: int
) -> tuple[Tensor, int]:
    """The floor(half / W) best of each of the W windows as a mask (B, N), and their number."""
    (h, w), device = grid, score.device
    heights, widths = ([min(side, edge - at) for at in range(0, edge, side)] for edge in grid)
    share = half // (len(heights) * len(widths))
    count = sum(min(share, height * width) for height in heights for width in widths)

    token = torch.arange(h * w, device=device)
    window = token // w // side * len(widths) + token % w // side
    size = torch.zeros(len(heights) * len(widths), dtype=torch.int64, device=device)
    start = size.index_add_(0, window, torch.ones_like(window)).cumsum(0) - size
    order = topk_stable(score, h * w)  # best first, then by window: its best is first
    owner, then = window[order].sort(dim=-1, stable=True)
    chosen = token - start[owner] < share
    return torch.zeros_like(score, dtype=torch.bool).scatter_(
        1, order.gather(1, then), chosen
    ), count


def _nearest(unit: Tensor, kept: Tensor) -> Tensor:
    """Which of the kept tokens (K,) each row (N, D) of length 1 is merged into, itself if kept."""
    place = torch.arange(len(kept), device=kept.device)
    return (unit @ unit[kept].mT).argmax(-1).scatter(0, kept, place)


def _means(features: Tensor, kept: Tensor, slot: Tensor) -> Tensor:
    """Rows (K, D): the mean of the features (N, D) of each slot."""
    place = torch.arange(len(kept), device=kept.device)
    member = (place[:, None] == slot).to(features.dtype)
    return member @ features / member.sum(-1, keepdim=True)
