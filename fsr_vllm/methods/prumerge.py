"""LLaVA-PruMerge: centres by [CLS] attention that gather their neighbours, and one row for all the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Method, Selection, VisualTokens, cosine_similarity, gather_rows, indices_of, mask_of, option
from .ops import topk_stable


@dataclass
class PruMerge(Method):
    """Centres by [CLS] attention, each plus a weighted sum of its nearest tokens, and one row for what is left over.

    Attention a is softmax(q . k / sqrt(C)) of the tower's last block, at full width, not head by head: `last_query` is
    the [CLS] query and `last_key` the keys. With N + 1 of them, [CLS] first, the softmax runs over all and [CLS] is
    dropped, as in the published code; with N it runs over these. A centre becomes itself plus the sum of a_j x_j over
    the `neighbours` other tokens of highest cosine of keys, other centres included, all with the features they came
    with, weights not normalised. The extra row is the sum of a_j x_j over all tokens that are no centre.

    Exact K: the paper's number of centres follows from outliers of a; here there are K - 1, and the extra row is the
    last. "base" takes the K - 1 of highest a. "plus" (PruMerge+) takes floor((K - 1) / 4) of them and fills up evenly:
    of the R others, in raster order, every floor(R / wanted)-th, and of these the wanted number with the highest a; all
    are centres alike. The extra row is put at the place of highest a that is no centre; tokens that are no centre count
    as merged into it, whichever centres they went to besides. The authors merge before the projector; here it is done
    in the space of `features`. At K = 1 there is the extra row alone.
    """

    name: ClassVar[str] = "prumerge"
    needs: ClassVar[tuple[str, ...]] = ("last_query", "last_key")
    paper: ClassVar[str] = (
        "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (arXiv 2403.15388)"
    )
    licence: ClassVar[str] = "Apache-2.0"

    variant: str = option("base", choices=("base", "plus"), doc="PruMerge, or PruMerge+ with evenly spread centres")
    neighbours: int = option(32, low=0, doc="tokens added to each centre")

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        features, key = tokens.features, tokens.require("last_key").float()
        b, n, _ = features.shape
        logits = (key * tokens.require("last_query").float()[:, None]).sum(-1) * key.shape[2] ** -0.5
        attention = logits.softmax(-1)[:, -n:]
        logits = logits[:, -n:]  # they rank as attention does, also where it underflows

        centres = topk_stable(logits, k - 1) if self.variant == "base" else _spread(logits, k - 1)
        is_centre = mask_of(centres, n)
        place = logits.masked_fill(is_centre, -torch.inf).argmax(-1, keepdim=True)
        near = gather_rows(cosine_similarity(key[:, -n:]), centres).scatter(2, centres[..., None], -torch.inf)
        near = topk_stable(near, min(self.neighbours, n - 1))
        of_centres = torch.zeros(b, k - 1, n, device=features.device)
        of_centres = of_centres.scatter(2, near, attention[:, None].expand(-1, k - 1, -1).gather(2, near))
        weights = torch.cat([of_centres, attention.masked_fill(is_centre, 0.0)[:, None]], 1)

        precise = features.to(torch.promote_types(features.dtype, torch.float32))
        # Image by image: a batched product may round differently, and then a batch would not equal its images.
        added = torch.stack([w @ image for w, image in zip(weights.to(precise.dtype), precise, strict=True)])
        own = torch.nn.functional.pad(gather_rows(precise, centres), (0, 0, 0, 1))  # the extra row starts at zero
        merged_into = torch.where(is_centre, -1, place).scatter(1, place, -1)
        merged = torch.full((b,), n - k, device=features.device)
        return Selection(torch.cat([centres, place], 1), rows=own + added, merged_into=merged_into, num_merged=merged)


def _spread(score: Tensor, count: int) -> Tensor:
    """A quarter of count by score, the others evenly spaced over what is left: (B, count)."""
    n = score.shape[1]
    best = topk_stable(score, count // 4)
    wanted = count - best.shape[1]
    rest = indices_of(~mask_of(best, n), n - best.shape[1])
    rest = rest[:, :: max(1, rest.shape[1] // max(1, wanted))]
    trimmed = rest.gather(1, topk_stable(score.gather(1, rest), wanted))
    return torch.cat([best, trimmed], 1)
