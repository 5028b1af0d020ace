"""VisPruner: the important by attention, and the rest thinned out where it repeats itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Method, PerToken, Selection, VisualTokens, cosine_similarity, option, topk_stable

_ROWS = 64  # of cosines compared at a time on a CPU


@dataclass
class VisPruner(Method):
    """Half by [CLS] attention, half by removing, few at a time, the tokens most like another one.

    The int(ratio * K) most salient tokens are kept. The others, most salient first, are a list R;
    until as many are left as are wanted, its places 0, 2, 4, ... are compared with its places 1, 3,
    5, ..., and of the former the `step` with the highest cosine to any of the latter are dropped.
    The next R is what remains of the former, highest such cosine first, then the latter in their
    old order. Cosines are those of `metric`, the features before the projector, where given, else
    of `features`.

    The authors' step is 8, at N = 576. Rounds compare all pairs of even and odd places, so that a
    fixed step costs O(N^3): without one it is 8 up to N = 576 and grows in proportion beyond, and a
    request may not ask for less.

    The published code fails on a list of odd length; here the even places are then one more than
    the odd ones. The last step drops no more than needed, and none drops more than the even places
    hold. Of equal cosines the token of lower index stays. 0.5 is the authors' ratio; their example
    for 64 tokens on MME takes 0.75.
    """

    name: ClassVar[str] = "vispruner"
    needs: ClassVar[tuple[str, ...]] = ("saliency",)
    uses: ClassVar[tuple[str, ...]] = ("metric",)
    paper: ClassVar[str] = (
        "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs (arXiv 2412.01818)"
    )
    license: ClassVar[str] = "Apache-2.0"

    ratio: float = option(
        0.5, low=0, high=1, doc="share of K chosen by saliency, the others by diversity"
    )
    step: int = option(
        0,
        low=0,
        served=PerToken(72),
        doc="tokens dropped before the others are compared anew; 0: 8, or N / 72 if more",
    )

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        saliency = tokens.require("saliency").float()
        important = int(k * self.ratio)
        order = topk_stable(saliency, saliency.shape[1])
        if important == k:
            return Selection(order[:, :k])
        similarity = cosine_similarity(tokens.features if tokens.metric is None else tokens.metric)
        step = self.step or max(8, PerToken(72).least(saliency.shape[1]))
        diverse = _thin_out(similarity, order[:, important:], k - important, step)
        return Selection(torch.cat([order[:, :important], diverse], 1))


def _thin_out(similarity: Tensor, rest: Tensor, wanted: int, step: int) -> Tensor:
    """Drop from rest (B, R) until `wanted` are left; similarity (B, N, N)."""
    nowhere = torch.full(similarity.shape[:2], torch.inf, device=rest.device)
    while (surplus := rest.shape[1] - wanted) > 0:
        even, odd = rest[:, ::2], rest[:, 1::2]
        redundancy = _closest(similarity, even, odd)
        stay = even.shape[1] - min(step, surplus, even.shape[1])
        # Sorted in the order of tokens, so that of equal ones the lower index comes first, and
        # stays.
        staying = nowhere.scatter(1, even, redundancy).sort(dim=-1, stable=True).indices[:, :stay]
        rest = torch.cat([staying.flip(1), odd], 1)
    return rest


def _closest(similarity: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """For each of the even places (B, E) its highest cosine to any of the odd ones (B, O)."""
    if similarity.device.type != "cpu":
        image = torch.arange(len(even), device=even.device)[:, None, None]
        return similarity[image, even[:, :, None], odd[:, None, :]].amax(-1)
    # A few rows at a time stay in a core's cache while their columns are picked: a quarter of the
    # time.
    parts = zip(similarity, even, odd, strict=True)
    found = [
        [cos.index_select(0, own).index_select(1, b).amax(-1) for own in a.split(_ROWS)]
        for cos, a, b in parts
    ]
    return torch.stack([torch.cat(image) for image in found])
