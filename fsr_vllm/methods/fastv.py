"""FastV: what the prompt's last token attends to in an early decoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Fidelity, ScoreMethod, VisualTokens


@dataclass
class FastV(ScoreMethod):
    """Top K by the attention that the last token of the prompt pays in an early decoder layer.

    `probe` must hold, for each visual token, (N,): the attention weight from the prompt's last
    token to it, mean over the heads, at decoder layer K - 1 of the paper, which is the second one
    (index 1; the authors' demo takes index 2).

    The paper drops tokens after that layer: the layers before it see all of them, and positions are
    kept. Here the criterion is applied to the input, so every layer sees K tokens: compare at an
    equal number of tokens, not at the paper's averages over layers.
    """

    name: ClassVar[str] = "fastv"
    needs: ClassVar[tuple[str, ...]] = ("probe",)
    servable: ClassVar[bool] = False
    query_aware: ClassVar[bool] = True
    paper: ClassVar[str] = (
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language"
        " Models (arXiv 2403.06764)"
    )
    license: ClassVar[str] = "unclear"
    fidelity: ClassVar[Fidelity] = "input-probe"

    def score(self, tokens: VisualTokens) -> Tensor:
        probe = tokens.require("probe")
        if probe.dim() != 2:
            raise ValueError(
                f"probe must hold one number per token, (N,), for fastv; got {tuple(probe.shape[1:])}"
            )
        return probe
