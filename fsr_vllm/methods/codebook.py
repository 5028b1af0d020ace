"""Redundancy through language: a codebook of rows that told the language model nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import ScoreMethod, VisualTokens, normalise


@dataclass
class Codebook(ScoreMethod):
    """Drops the tokens most similar to any prototype of a codebook of redundant ones; the K least
    similar stay.

    The codebook is made offline for one model, in the space of features: `prototypes.py` builds,
    saves and loads it. This is the variant with a fixed count of the authors' code; the other keeps
    whatever is below a threshold, so that K would depend on the image.
    """

    name: ClassVar[str] = "codebook"
    needs: ClassVar[tuple[str, ...]] = ("prototypes",)
    paper: ClassVar[str] = (
        "Beyond Intermediate States: Explaining Visual Redundancy through Language (arXiv 2503.20540)"
    )
    license: ClassVar[str] = "Apache-2.0"

    def score(self, tokens: VisualTokens) -> Tensor:
        # One product per image, so that a batch equals its images to the bit.
        pairs = zip(tokens.features, tokens.require("prototypes"), strict=True)
        return torch.stack(
            [-(normalise(image) @ normalise(book).mT).amax(-1) for image, book in pairs]
        )
