"""The K tokens most relevant to the question."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import ScoreMethod, VisualTokens


@dataclass
class Relevance(ScoreMethod):
    """Top K by relevance to the question: FSR without saliency, scan and refine.

    The control beside `fastervlm`.
    """

    name = "relevance"
    needs = ("relevance",)
    query_aware = True
    license = "none needed"
    fidelity = "control"

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.require("relevance")
