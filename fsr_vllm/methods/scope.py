"""SCOPE: saliency times the coverage that a token adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fsr_vllm.kernels import coverage_greedy

from .base import Method, Selection, VisualTokens, cosine_similarity, option


@dataclass
class Scope(Method):
    """Round by round the token of highest saliency^alpha times what it adds to the coverage of all tokens.

    With c_i the best cosine of token i to a chosen one, at least 0, token j adds sum_i max(0, cos_ij - c_i). Saliency
    counts relative to the row's largest, which changes no pick, and below 0 as 0; where all products are 0 the lower
    index goes first. The additive variant is left out: its balance is not published. Cosines are rounded to multiples
    of 2^-20, see kernels/grid.py.
    """

    name: ClassVar[str] = "scope"
    needs: ClassVar[tuple[str, ...]] = ("saliency",)
    paper: ClassVar[str] = (
        "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs (arXiv 2510.24214)"
    )
    licence: ClassVar[str] = "none published"

    alpha: float = option(1.0, low=0, doc="exponent of saliency; 0 leaves coverage alone")

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        saliency = tokens.require("saliency").float().clamp(min=0)
        most = saliency.amax(-1, keepdim=True)
        weight = (saliency / torch.where(most > 0, most, 1.0)).pow(self.alpha)
        return Selection(coverage_greedy(cosine_similarity(tokens.features), k, candidate_weight=weight))
