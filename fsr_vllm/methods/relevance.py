"""The K tokens most relevant to the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Fidelity, ScoreMethod, VisualTokens


@dataclass
class Relevance(ScoreMethod):
    """Top K by relevance to the question: FSR without saliency, scan and refine; the control beside
    `fastervlm`.
    """

    name: ClassVar[str] = "relevance"
    needs: ClassVar[tuple[str, ...]] = ("relevance",)
    query_aware: ClassVar[bool] = True
    license: ClassVar[str] = "none needed"
    fidelity: ClassVar[Fidelity] = "control"

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.require("relevance")
