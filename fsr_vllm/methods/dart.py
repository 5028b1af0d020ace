"""DART: a few pivots, and for each the tokens least like it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import (
    Fidelity,
    Method,
    Selection,
    VisualTokens,
    gather_rows,
    indices_of,
    mask_of,
    normalise,
    option,
)
from .ops import topk_stable


@dataclass
class DART(Method):
    """A few tokens of large keys as pivots, and for each pivot in turn the tokens least similar to
    it.

    `probe` must hold, for each visual token, (N, Dk): its key in an early decoder layer, heads side
    by side, after the rotary embedding; the first layer's will do, which needs no attention.
    `text`, where given, must hold the language model's input embeddings of the question's T tokens,
    in the space of `features`.

    Pivots are the visual tokens whose key has the largest L1 norm, and the text tokens with the
    largest one; the former are kept. For each pivot, the visual ones first, largest first, the
    floor((K - P) / pivots) not yet chosen tokens of lowest cosine to it are kept, P being the
    number of visual pivots. Exact K: what rounding leaves is filled by the first pivots, which take
    one more each after all have had their turn. If K is below the number of visual pivots, there
    are only K of these.

    The paper does this after the second layer, with that layer's keys and hidden states. Here it is
    done at the input: embeddings stand in for hidden states, and the norm of a text token's
    embedding for that of its key, which `probe` does not hold. Without text there are the visual
    pivots alone. The authors' program, of which a copy is public under another account, picks the
    same tokens.
    """

    name: ClassVar[str] = "dart"
    needs: ClassVar[tuple[str, ...]] = ("probe",)
    uses: ClassVar[tuple[str, ...]] = ("text",)
    servable: ClassVar[bool] = False
    query_aware: ClassVar[bool] = True
    paper: ClassVar[str] = (
        "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More (arXiv 2502.11494)"
    )
    license: ClassVar[str] = "Apache-2.0"
    fidelity: ClassVar[Fidelity] = "input-probe"

    image_pivots: int = option(4, low=1, doc="visual tokens that serve as pivots")
    text_pivots: int = option(4, low=0, doc="text tokens that serve as pivots")

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        features, probe, text = tokens.features, tokens.require("probe"), tokens.text
        if probe.dim() != 3:
            raise ValueError(
                f"probe must hold one key per token, (N, Dk), for dart; got {tuple(probe.shape[1:])}"
            )
        if text is not None and text.shape[2] != features.shape[2]:
            raise ValueError(
                f"text must have the width of features, {features.shape[2]}; got {text.shape[2]}"
            )
        own = _largest(probe, min(k, self.image_pivots))
        rows = [gather_rows(features, own).float()]
        if text is not None:
            rows.append(
                gather_rows(text, _largest(text, min(text.shape[1], self.text_pivots))).float()
            )
        pivots = torch.cat(rows, 1)
        # Image by image: a batched product may round differently, and then a batch would not equal
        # its images.
        pairs = zip(normalise(features), normalise(pivots), strict=True)
        distance = torch.stack([-(pivot @ unit.mT) for unit, pivot in pairs])

        taken = mask_of(own, features.shape[1])
        share, left = divmod(k - own.shape[1], pivots.shape[1])
        turns = [(i, share) for i in range(pivots.shape[1])] + [(i, 1) for i in range(left)]
        for i, count in turns:
            picks = topk_stable(distance[:, i].masked_fill(taken, -torch.inf), count)
            taken = taken.scatter(1, picks, True)
        return Selection(indices_of(taken, k))


def _largest(x: Tensor, count: int) -> Tensor:
    """Places (B, count) of the rows of x (B, N, D) with the largest L1 norm."""
    return topk_stable(x.float().abs().sum(-1), count)
