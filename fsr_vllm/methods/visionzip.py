"""VisionZip: dominant tokens by attention, and the rest merged into a few contextual ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import (
    Method,
    Selection,
    VisualTokens,
    cosine_similarity,
    gather_rows,
    indices_of,
    mask_of,
    option,
)
from .ops import topk_stable


@dataclass
class VisionZip(Method):
    """The most salient tokens with the [CLS] row, and evenly spaced others that take in what is
    most like them.

    Of K rows C = floor(contextual_share * K + 0.5) are contextual, at most K - 1; the others are
    dominant: the [CLS] row, where given, counts as one, then come the most salient tokens. What is
    not dominant stays in order; every step-th of these R tokens is a centre, step = max(1, floor(R
    / C)), C of them. Each other token goes to the centre of highest cosine of `keys`, which hold
    the mean over the heads of the layer's keys, unscaled. A contextual row is the centre plus the
    mean of what went to it: a sum of two, as in the published code, so of about twice the length.

    The [CLS] row is put at the most salient place not otherwise kept; the token there was merged
    like the others, but does not count as merged. Rows are in raster order, where the code puts
    [CLS] first and contextual rows last. The authors merge before the projector: so does this where
    features are those; after it the same rule is applied there. Towers without [CLS] do without its
    row.
    """

    name: ClassVar[str] = "visionzip"
    needs: ClassVar[tuple[str, ...]] = ("saliency", "keys")
    uses: ClassVar[tuple[str, ...]] = ("cls_row",)
    paper: ClassVar[str] = (
        "VisionZip: Longer is Better but Not Necessary in Vision Language Models (arXiv 2412.04467)"
    )
    license: ClassVar[str] = "Apache-2.0"

    contextual_share: float = option(
        10 / 64, low=0, high=1, doc="share of K for contextual (merged) rows"
    )

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        features, saliency = tokens.features, tokens.require("saliency").float()
        b, n, _ = features.shape
        precise = features.to(torch.promote_types(features.dtype, torch.float32))
        contextual = min(k - 1, math.floor(self.contextual_share * k + 0.5))
        salient = k - contextual - (tokens.cls_row is not None)

        indices = topk_stable(saliency, salient)
        rows = [gather_rows(precise, indices)]
        merged_into = torch.full((b, n), -1, device=features.device)
        if contextual:
            rest = indices_of(~mask_of(indices, n), n - salient)
            centres = rest[:, :: max(1, (n - salient) // contextual)][:, :contextual]
            slot = gather_rows(cosine_similarity(tokens.require("keys")), centres).argmax(1)
            indices = torch.cat([indices, centres], 1)
            merged_into = centres.gather(1, slot).masked_fill(mask_of(indices, n), -1)
            # Image by image: a batched product may round differently, and then a batch would not
            # equal its images.
            parts = zip(precise, centres, merged_into, strict=True)
            rows.append(torch.stack([_contextual(image, own, into) for image, own, into in parts]))
        if tokens.cls_row is not None:
            free = saliency.masked_fill(mask_of(indices, n), -torch.inf).argmax(-1, keepdim=True)
            indices = torch.cat([indices, free], 1)
            merged_into = merged_into.scatter(1, free, -1)
            rows.append(tokens.cls_row[:, None].to(precise.dtype))
        return Selection(
            indices,
            rows=torch.cat(rows, 1),
            merged_into=merged_into,
            num_merged=(merged_into >= 0).sum(-1),
        )


def _contextual(features: Tensor, centres: Tensor, merged_into: Tensor) -> Tensor:
    """Rows (C, D): each centre plus the mean of the features (N, D) that were merged into it."""
    member = (merged_into == centres[:, None]).to(features.dtype)
    return features[centres] + member @ features / member.sum(-1, keepdim=True).clamp(min=1)
