"""CDPruner: relevance and diversity in one determinant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fsr_vllm.kernels import dpp_greedy

from .base import Method, Selection, VisualTokens, cosine_similarity, minmax, option

_EPSILON = (
    1e-6  # the authors': added to the numerator of the scaling, so that no token has relevance 0
)


@dataclass
class CDPruner(Method):
    """The K tokens that are relevant to the question and least alike: greedy MAP of a conditional
    DPP.

    Kernel L_ij = w_i * cos(v_i, v_j) * w_j, where w is relevance scaled to [0, 1]; each step takes
    the token with the largest variance left once the chosen ones are projected out (fast greedy
    MAP, arXiv 1709.05135).

    Code and paper differ in w: the published code multiplies by the scaled relevance itself, the
    paper by exp(a * relevance) with a = theta / (2 * (1 - theta)), an option here. Scaling has an
    epsilon in its numerator only. A positive factor on w changes no pick, so w is divided by (max -
    min + epsilon), which also settles what the code leaves to a division by zero: of constant
    relevance w is 1, and diversity alone decides. Cosines are float32 throughout, where the code
    normalises in the model's precision. The authors average relevance over pieces of a long
    question and turn its sign for CLIP: both are settled where relevance is computed.
    """

    name: ClassVar[str] = "cdpruner"
    needs: ClassVar[tuple[str, ...]] = ("relevance",)
    uses: ClassVar[tuple[str, ...]] = ("group",)
    query_aware: ClassVar[bool] = True
    paper: ClassVar[str] = (
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs (arXiv 2506.10967)"
    )
    license: ClassVar[str] = "Apache-2.0"

    weighting: str = option(
        "product", choices=("product", "exp"), doc="w: relevance (code) or its exponential (paper)"
    )
    theta: float = option(
        0.5, low=0, high=0.95, doc='weight of relevance in weighting="exp"; 0 leaves it out'
    )
    norm_scope: str = option(
        "group",
        choices=("group", "row"),
        doc="relevance is scaled over a group such as tiles (code), or per row",
    )

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        relevance, group = (
            tokens.require("relevance"),
            tokens.group if self.norm_scope == "group" else None,
        )
        if self.weighting == "product":
            weight = _scaled(relevance.float(), group)
        else:  # exponents end at 0, so that nothing overflows
            weight = torch.exp(
                (minmax(relevance, group) - 1) * (self.theta / (2 * (1 - self.theta)))
            )
        kernel = cosine_similarity(tokens.features) * (weight[:, :, None] * weight[:, None, :])
        return Selection(dpp_greedy(kernel, k))


def _scaled(relevance: Tensor, group: Tensor | None) -> Tensor:
    """(r - min + epsilon) / (max - min + epsilon), min and max over the row or over all rows of its
    group.
    """
    if group is None:
        group = torch.arange(len(relevance), device=relevance.device)
    same = group[:, None] == group
    low = torch.where(same, relevance.amin(-1), torch.inf).amin(-1)[:, None]
    high = torch.where(same, relevance.amax(-1), -torch.inf).amax(-1)[:, None]
    return (relevance - low + _EPSILON) / (high - low + _EPSILON)
