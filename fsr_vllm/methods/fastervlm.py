"""FasterVLM: the K tokens that [CLS] attends to most."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import ScoreMethod, VisualTokens


@dataclass
class FasterVLM(ScoreMethod):
    """Top K by [CLS] attention: FSR without relevance, scan and refine.

    FasterVLM, arXiv 2412.01818v1.
    """

    name = "fastervlm"
    needs = ("saliency",)
    paper = "arXiv 2412.01818"
    license = "Apache-2.0"

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.require("saliency")
