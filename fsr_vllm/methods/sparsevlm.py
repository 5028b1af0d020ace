"""SparseVLM: what those words of the question attend to that have to do with the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Fidelity, ScoreMethod, VisualTokens


@dataclass
class SparseVLM(ScoreMethod):
    """Top K by the attention, in an early decoder layer, of the question's tokens that fit the
    image best.

    `text` must hold the language model's input embeddings of the T tokens behind the image, in the
    space of `features`: for the authors that is the question with the tail of the prompt, the cue
    to answer included. `probe` must hold, for each visual token, (N, T): the attention weight from
    each of these tokens to it, mean over the heads, at decoder layer index 2, the first at which
    the paper prunes.

    Raters are the text tokens t whose mean over the visual tokens v of softmax_t(v . t), unscaled,
    is above the mean over text tokens; if none is above it, which the paper leaves open, all are. A
    visual token's score is the raters' mean attention.

    The paper prunes in steps, at layers 2, 6 and 15; here the criterion of the first is applied to
    the input, once. Recycling of pruned tokens into cluster means, which its second version also
    dropped, is left out.
    """

    name: ClassVar[str] = "sparsevlm"
    needs: ClassVar[tuple[str, ...]] = ("probe", "text")
    servable: ClassVar[bool] = False
    query_aware: ClassVar[bool] = True
    paper: ClassVar[str] = (
        "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (arXiv 2410.04417)"
    )
    license: ClassVar[str] = "Apache-2.0"
    fidelity: ClassVar[Fidelity] = "input-probe"

    def score(self, tokens: VisualTokens) -> Tensor:
        features, text, probe = tokens.features, tokens.require("text"), tokens.require("probe")
        (t, width), d = text.shape[1:], features.shape[2]
        if t == 0 or width != d:
            raise ValueError(
                f"text must hold one or more rows of the width of features, {d}; got {t} of {width}"
            )
        if probe.dim() != 3 or probe.shape[2] != t:
            raise ValueError(
                f"probe must hold (N, T) numbers, T = {t}, for sparsevlm; got {tuple(probe.shape[1:])}"
            )
        # Image by image: a batched product may round differently, and then a batch would not equal
        # its images.
        fit = [
            (image.float() @ own.float().mT).softmax(-1).mean(0)
            for image, own in zip(features, text, strict=True)
        ]
        fits = torch.stack(fit)
        raters = fits > fits.mean(-1, keepdim=True)
        raters = raters | ~raters.any(-1, keepdim=True)
        return (probe.float() * raters[:, None]).sum(-1) / raters.sum(-1, keepdim=True)
