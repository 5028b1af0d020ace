"""IVC-Prune: what resembles the question in a decoder layer's values, and tokens at telling
positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Fidelity, Method, Selection, VisualTokens, mask_of, option, topk_stable


@dataclass
class IVC(Method):
    """Tokens at positions that rotary embedding turns by about 0 or 90 degrees, and those closest
    to the question.

    `probe` must hold, for each visual token i, (N, N + T): column j < N its similarity to visual
    token j, column N + t its similarity to the t-th text token after the image. A column is softmax
    over the visual tokens i of v_j . v_i / sqrt(head_dim), mean over the heads, of the values v in
    decoder layer k - 1, where k is 16 for LLaVA-1.5 and Qwen2.5-VL-7B, 22 for Qwen2.5-VL-3B and 2
    for Qwen2-VL.

    Seeds are the max(1, round(seed_share * N)) visual tokens of highest mean over the text columns;
    they are always kept. The score is the mean over the columns of the seeds and of the text. Of K
    tokens round(position_share * K) are those with the largest sum of cos(p * theta_f) over the
    frequencies f, p being the token's position in the prompt, and as many those with the largest
    sum of sin; a token may be several of these, and the score fills up to exactly K, or, where
    seeds and positions are more than K, drops positions first. Halves are rounded to the even
    number.

    Filling up is what the code does for Qwen (10 % + 10 % of N by position, 50 % in all); for LLaVA
    it keeps 5 % + 5 % by position and the best 20 %. The default is the paper's 10 % by position
    beside 40 %: 0.1 of K by each criterion. positions = "grid" is for M-RoPE: the mean over its
    axes, of which only height and width differ between the tokens of an image (without a grid there
    is one row).

    Positions mean something to the model only if they survive pruning: where the server numbers the
    kept tokens anew, as vLLM does for LLaVA, position_share = 0 is the honest setting. The paper
    runs k layers on all tokens and then drops the cache entries of the pruned ones in every layer;
    here the criterion is applied to the input.
    """

    name: ClassVar[str] = "ivc"
    needs: ClassVar[tuple[str, ...]] = ("probe",)
    uses: ClassVar[tuple[str, ...]] = ("grid",)
    servable: ClassVar[bool] = False
    query_aware: ClassVar[bool] = True
    paper: ClassVar[str] = (
        "IVC-Prune: Revealing the Implicit Visual Coordinates in LVLMs for Vision Token Pruning (arXiv 2602.03060)"
    )
    license: ClassVar[str] = "unclear"
    fidelity: ClassVar[Fidelity] = "input-probe"

    seed_share: float = option(0.01, low=0, high=1, doc="share of N that joins the text as queries")
    position_share: float = option(
        0.1, low=0, high=0.5, doc="share of K by cosine, and again by sine, of positions"
    )
    positions: str = option(
        "raster", choices=("raster", "grid"), doc="one axis (RoPE), or height and width (M-RoPE)"
    )
    first_position: int = option(
        35, low=0, doc="position of the image's first token in the prompt (35: LLaVA-1.5)"
    )
    rope_base: float = option(
        10000.0, low=1, doc="base of the rotary frequencies (Qwen2.5: 1000000)"
    )
    head_dim: int = option(128, low=2, doc="width of an attention head of the language model")

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        probe, (_, n, _) = tokens.require("probe"), tokens.features.shape
        if probe.dim() != 3 or probe.shape[2] <= n:
            shape = tuple(probe.shape[1:])
            raise ValueError(
                f"probe must hold (N, N + T) similarities, T >= 1 text tokens, for ivc; got {shape}"
            )
        probe = probe.float()
        text = probe[..., n:]
        seeds = topk_stable(text.mean(-1), max(1, round(self.seed_share * n)))
        queries = probe.gather(2, seeds[:, None].expand(-1, n, -1))
        order = topk_stable(torch.cat([queries, text], 2).mean(-1), n)

        count = round(self.position_share * k)
        cosine, sine = self._turns(tokens.grid or (1, n), probe.device)
        telling = mask_of(topk_stable(cosine, count), n) | mask_of(topk_stable(sine, count), n)
        tier = torch.where(mask_of(seeds, n), 2, telling.long())
        first = topk_stable(tier.gather(1, order), k)
        return Selection(order.gather(1, first))

    def _turns(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Sums of cos and of sin, (1, N) each, over the frequencies of every token's position, and
        over its axes.
        """
        h, w = grid
        token = torch.arange(h * w, device=device)
        axes = [token] if self.positions == "raster" else [token // w, token % w]
        exponent = torch.arange(0, self.head_dim - 1, 2, device=device).double() / self.head_dim
        angles = (self.first_position + torch.stack(axes))[..., None] / self.rope_base**exponent
        # The axes are summed last: a sum of two is the same in either order, so mirrored places
        # tie.
        cosine, sine = (turn(angles).sum(-1).sum(0) for turn in (torch.cos, torch.sin))
        return cosine[None].float(), sine[None].float()
