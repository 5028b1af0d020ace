"""QuoTA's allocation: every frame gets its share of the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Fidelity, Method, Selection, VisualTokens, indices_of, option, topk_stable


@dataclass
class Quota(Method):
    """Tokens per frame in proportion to the frame's weight; within a frame the most salient, or
    evenly spaced ones.

    `frame_weights` (F,) belong to F equal runs of tokens (if F does not divide N, of nearly equal
    length); a negative weight counts as 0. A frame that holds c of the tokens given out gets the
    next one if weight / (c + 1) is highest (ties: fewer tokens, then lower index), until K are
    given out: so each has at least int(K * share of the weight), as in QuoTA, or all its tokens,
    and what rounding down and full frames leave goes where the weight per token is highest. Frames
    of weight 0 get none before the others are full.

    QuoTA's weights are the squares of a scorer's probabilities: give weights, or probabilities with
    power = 2. The scorer, a second vision-language model asked about every frame, is outside. QuoTA
    then resizes each frame to its number of tokens; here tokens are selected instead: with saliency
    the highest of the frame, without it its tokens floor((i + 0.5) * length / count). Its cap on a
    frame's share, absent from the default version, is left out.
    """

    name: ClassVar[str] = "quota"
    needs: ClassVar[tuple[str, ...]] = ("frame_weights",)
    uses: ClassVar[tuple[str, ...]] = ("saliency",)
    servable: ClassVar[bool] = False
    query_aware: ClassVar[bool] = True
    paper: ClassVar[str] = (
        "QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension (arXiv 2503.08689)"
    )
    license: ClassVar[str] = "unclear"
    fidelity: ClassVar[Fidelity] = "stage-1"

    power: float = option(1.0, low=0, high=4, doc="exponent of frame_weights")

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        weights = tokens.require("frame_weights").double().clamp(min=0).pow(self.power)
        (b, n, _), frames = tokens.features.shape, weights.shape[1]
        token = torch.arange(n, device=weights.device)
        frame = token * frames // n
        length = torch.zeros(frames, dtype=torch.int64, device=weights.device)
        length = length.index_add_(0, frame, torch.ones_like(frame))
        place = token - (length.cumsum(0) - length)[frame]  # within the frame

        # The c-th token of a frame is worth weight / c: the K best, sorted by c and frame first, so
        # that ties go there.
        turn = (place * frames + frame).argsort()
        given = frame[turn][topk_stable((weights[:, frame] / (place + 1))[:, turn], k)]
        count = torch.zeros(b, frames, dtype=torch.int64, device=weights.device)
        count = count.scatter_add_(1, given, torch.ones_like(given))[:, frame]

        if tokens.saliency is None:
            # The multiples (2 i + 1) * length, below 2 * count * place and below 2 * count * (place
            # + 1).
            before, after = (
                (2 * count * x - 1 + length[frame]) // (2 * length[frame])
                for x in (place, place + 1)
            )
            return Selection(indices_of(after > before, k))
        order = topk_stable(tokens.saliency.float(), n)
        order = order.gather(
            1, frame[order].sort(dim=-1, stable=True).indices
        )  # frame by frame, best first
        return Selection(
            indices_of(
                torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, place < count), k
            )
        )
