"""SCOPE: saliency times the coverage that a token adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fsr_vllm.kernels import coverage_greedy

from .base import Method, Selection, VisualTokens, cosine_similarity, option


@dataclass
class Scope(Method):
    """Round by round the token of highest saliency^alpha times what it adds to the coverage of all
    tokens.

    With c_i the best cosine of token i to a chosen one, at least 0, token j adds sum_i max(0,
    cos_ij - c_i). Cosines are those of `metric`, the tower's own rows before the projector, as in
    the authors' program; of `features` where there is no metric. combine="sum" is the additive
    variant of their repository: gain + (summed saliency)^alpha, no weight between the two; there
    saliency is the sum over the heads, so `heads` says of how many it is the mean here.

    In the product saliency counts relative to the row's largest, which changes no pick; below 0 it
    counts as 0. Where all scores are equal the lower index goes first. Cosines are rounded to
    multiples of 2^-20, see kernels/grid.py.
    """

    name: ClassVar[str] = "scope"
    needs: ClassVar[tuple[str, ...]] = ("saliency",)
    uses: ClassVar[tuple[str, ...]] = ("metric",)
    paper: ClassVar[str] = (
        "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs (arXiv 2510.24214)"
    )
    license: ClassVar[str] = "none published"

    alpha: float = option(1.0, low=0, doc="exponent of saliency; 0 leaves coverage alone")
    combine: str = option(
        "product", choices=("product", "sum"), doc="gain times saliency, or plus saliency"
    )
    heads: int = option(
        16, low=1, high=1024, doc='attention heads, for combine="sum" (16: CLIP ViT-L)'
    )

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        saliency = tokens.require("saliency").float().clamp(min=0)
        similarity = cosine_similarity(tokens.features if tokens.metric is None else tokens.metric)
        if self.combine == "sum":
            return Selection(
                coverage_greedy(
                    similarity, k, candidate_bonus=(self.heads * saliency).pow(self.alpha)
                )
            )
        most = saliency.amax(-1, keepdim=True)
        weight = (saliency / torch.where(most > 0, most, 1.0)).pow(self.alpha)
        return Selection(coverage_greedy(similarity, k, candidate_weight=weight))
