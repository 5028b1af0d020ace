"""Redundancy through language: a codebook of rows that told the language model nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import ScoreMethod, VisualTokens, each_image, normalise


@dataclass
class Codebook(ScoreMethod):
    """Drops the tokens most similar to any prototype of a codebook of redundant ones.

    The codebook is made offline for one model, in the space of features: `prototypes.py` builds,
    saves and loads it. This is the variant with a fixed count of the authors' code; the other keeps
    whatever is below a threshold, so that K would depend on the image.
    """

    name = "codebook"
    needs = ("prototypes",)
    paper = (
        "Beyond Intermediate States: Explaining Visual Redundancy through Language (arXiv "
        "2503.20540)"
    )
    license = "Apache-2.0"

    def score(self, tokens: VisualTokens) -> Tensor:
        book = normalise(tokens.require("prototypes"))
        return each_image(_novelty, normalise(tokens.features), book)


def _novelty(unit: Tensor, book: Tensor) -> Tensor:
    return -(unit @ book.mT).amax(-1)
