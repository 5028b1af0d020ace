"""VScan, the stage before the language model: half by windows of an early layer, half by a late
one, then merging.
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
    indices_of,
    mask_of,
    normalise,
    option,
    topk_stable,
)
from .ops import square_grid


@dataclass
class VScan(Method):
    """Local tokens from every window by early attention, global ones by late attention; the rest
    merged into them.

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

    name: ClassVar[str] = "vscan"
    shallow_layer: ClassVar[int] = 5
    needs: ClassVar[tuple[str, ...]] = ("saliency", "shallow_saliency")
    uses: ClassVar[tuple[str, ...]] = ("grid",)
    paper: ClassVar[str] = (
        "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models (arXiv 2505.22654)"
    )
    license: ClassVar[str] = "MIT"
    fidelity: ClassVar[Fidelity] = "stage-1"

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
        # Image by image: a batched product may round differently, and then a batch would not equal
        # its images.
        merged = [_merge(image, own) for image, own in zip(tokens.features, kept, strict=True)]
        rows, merged_into = (torch.stack(column) for column in zip(*merged, strict=True))
        return Selection(
            kept,
            rows=rows,
            merged_into=merged_into,
            num_merged=torch.full((b,), n - k, device=deep.device),
        )


def _best_of_windows(
    score: Tensor, half: int, grid: tuple[int, int], side: int
) -> tuple[Tensor, int]:
    """The floor(half / W) best of each of the W windows as a mask (B, N), and how many these are."""
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


def _merge(features: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (K, D) of the kept tokens after merging, and the kept token each other one went into,
    (N,), else -1.
    """
    unit, place = normalise(features), torch.arange(len(kept), device=kept.device)
    slot = (unit @ unit[kept].mT).argmax(-1).scatter(0, kept, place)
    merged_into = kept[slot].scatter(0, kept, -1)
    precise = features.to(torch.promote_types(features.dtype, torch.float32))
    member = (place[:, None] == slot).to(precise.dtype)
    return member @ precise / member.sum(-1, keepdim=True), merged_into
