"""FasterVLM: the K tokens that [CLS] attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import ScoreMethod, VisualTokens


@dataclass
class FasterVLM(ScoreMethod):
    """Top K by [CLS] attention (FasterVLM, arXiv 2412.01818v1): FSR without relevance, scan and
    refine.
    """

    name: ClassVar[str] = "fastervlm"
    needs: ClassVar[tuple[str, ...]] = ("saliency",)
    paper: ClassVar[str] = "arXiv 2412.01818"
    license: ClassVar[str] = "Apache-2.0"

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.require("saliency")
