"""LLaVA-PruMerge: centres by [CLS] attention that gather their neighbours, and one row for all the
rest.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Method, Selection, VisualTokens, cosine_similarity, gather_rows, mask_of, option
from .ops import best_mask, topk_stable

_BLOCK = (
    512  # centres that gather their neighbours at a time: memory stays at a few N x 512 matrices
)


@dataclass
class PruMerge(Method):
    """Centres by [CLS] attention, each plus a weighted sum of its nearest tokens, and one row for
    what is left over.

    Attention a is softmax(q . k / sqrt(C)) of the tower's last block, at full width, not head by
    head: `last_query` is the [CLS] query and `last_key` the keys. With N + 1 of them, [CLS] first,
    the softmax runs over all and [CLS] is dropped, as in the published code; with N it runs over
    these. A centre becomes itself plus the sum of a_j x_j over the `neighbours` other tokens of
    highest cosine of keys, other centres included, all with the features they came with, weights
    not normalised. The extra row is the sum of a_j x_j over all tokens that are no centre.

    "plus" (PruMerge+), which the authors' program runs unless told otherwise, has two kinds of
    centres, all alike afterwards: the outliers, with a above the third quartile by more than 1.5
    interquartile ranges, and every s-th place of the whole raster but its last, s being a third of
    N / (number of outliers), both rounded down. "base" has centres of highest a alone.

    Exact K: the paper's number of centres follows from the outliers; here there are K - 1, and the
    extra row is the last. "base" takes the K - 1 of highest a. "plus" takes the outliers, of
    highest a if they are more than K - 1, and then the raster's places at the authors' s if this
    makes exactly K - 1; otherwise at the largest s that gives enough, of these the ones of highest
    a. The extra row is put at the place of highest a that is no centre; tokens that are no centre
    count as merged into it, whichever centres they went to besides. The authors merge before the
    projector; here it is done in the space of `features`. At K = 1 there is the extra row alone.
    """

    name: ClassVar[str] = "prumerge"
    needs: ClassVar[tuple[str, ...]] = ("last_query", "last_key")
    paper: ClassVar[str] = (
        "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (arXiv 2403.15388)"
    )
    license: ClassVar[str] = "Apache-2.0"

    variant: str = option(
        "plus", choices=("plus", "base"), doc="PruMerge+, with evenly spread centres, or PruMerge"
    )
    neighbours: int = option(32, low=0, doc="tokens added to each centre")

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        features, key = tokens.features, tokens.require("last_key").float()
        b, n, _ = features.shape
        logits = (key * tokens.require("last_query").float()[:, None]).sum(-1) * key.shape[
            2
        ] ** -0.5
        attention = logits.softmax(-1)[:, -n:]
        logits = logits[:, -n:]  # they rank as attention does, also where it underflows

        centres = (
            topk_stable(logits, k - 1)
            if self.variant == "base"
            else _spread(logits, attention, k - 1)
        )
        is_centre = mask_of(centres, n)
        place = logits.masked_fill(is_centre, -torch.inf).argmax(-1, keepdim=True)
        precise = features.to(torch.promote_types(features.dtype, torch.float32))
        similarity = cosine_similarity(key[:, -n:])
        added = [
            self._gathered(similarity, attention, precise, own)
            for own in centres.split(_BLOCK, dim=1)
        ]
        rest = attention.masked_fill(is_centre, 0.0)[:, None]
        added.append(_weighted(rest, precise))
        own = torch.nn.functional.pad(
            gather_rows(precise, centres), (0, 0, 0, 1)
        )  # the extra row starts at zero
        merged_into = torch.where(is_centre, -1, place).scatter(1, place, -1)
        merged = torch.full((b,), n - k, device=features.device)
        rows = own + torch.cat(added, 1)
        return Selection(
            torch.cat([centres, place], 1), rows=rows, merged_into=merged_into, num_merged=merged
        )

    def _gathered(
        self, similarity: Tensor, attention: Tensor, features: Tensor, centres: Tensor
    ) -> Tensor:
        """What is added to these centres (B, C): the weighted sums of their nearest other tokens,
        (B, C, D).
        """
        near = gather_rows(similarity, centres).scatter_(2, centres[..., None], -torch.inf)
        chosen = best_mask(near, min(self.neighbours, features.shape[1] - 1))
        return _weighted(torch.where(chosen, attention[:, None], 0.0), features)


def _weighted(weights: Tensor, features: Tensor) -> Tensor:
    """Sums (B, C, D) of features (B, N, D) with weights (B, C, N)."""
    # Image by image: a batched product may round differently, and then a batch would not equal its
    # images.
    return torch.stack(
        [w @ image for w, image in zip(weights.to(features.dtype), features, strict=True)]
    )


def _spread(score: Tensor, attention: Tensor, count: int) -> Tensor:
    """The outliers of attention, then evenly spaced places, count of them by score: (B, count)."""
    n = score.shape[1]
    outlier = _outliers(attention)
    found = outlier.sum(-1, keepdim=True)
    wanted = (count - found).clamp(min=0)
    step, place = _multiples(n)
    step, place = (
        step.to(score.device, non_blocking=True),
        place.to(score.device, non_blocking=True),
    )
    new = torch.zeros(score.shape, dtype=torch.int64, device=score.device)
    new = new.index_add_(
        1, step, (~outlier)[:, place].long()
    )  # by step: places of its raster that are no outliers

    token = torch.arange(n, device=score.device)
    published = (n // found.clamp(min=1) // 3).clamp(1, max(1, n - 1))
    fits = (found > 0) & (new.gather(1, published.clamp(max=n - 1)) == wanted)
    largest = torch.where((new >= wanted) & (token > 0), token, 1).amax(-1, keepdim=True)
    stride = torch.where(fits, published, largest)
    tier = torch.where(outlier, 2, ((token % stride == 0) & (token < n - 1)).long())
    order = topk_stable(score, n)
    return order.gather(1, topk_stable(tier.gather(1, order), count))


def _outliers(attention: Tensor) -> Tensor:
    """Which tokens (B, N) lie above the third quartile by more than 1.5 interquartile ranges."""
    ranked, last = attention.double().sort(dim=-1).values, attention.shape[1] - 1
    quartiles = []
    for share in (0.25, 0.75):
        low = int(share * last)
        high = min(low + 1, last)
        quartiles.append(ranked[:, low] + (share * last - low) * (ranked[:, high] - ranked[:, low]))
    first, third = quartiles
    return attention.double() > (third + 1.5 * (third - first))[:, None]


@functools.lru_cache(maxsize=16)
def _multiples(n: int) -> tuple[Tensor, Tensor]:
    """All pairs (s, p): p a multiple of s below n - 1, for every s from 1 to n - 1; about n log n
    of them.
    """
    step = torch.arange(1, n)
    count = (n - 2) // step + 1
    start = count.cumsum(0) - count
    repeated = step.repeat_interleave(count)
    return repeated, repeated * (torch.arange(len(repeated)) - start.repeat_interleave(count))
