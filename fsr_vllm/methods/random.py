"""Control: K tokens drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Fidelity, Method, Selection, VisualTokens, option


@dataclass
class Random(Method):
    """K tokens drawn uniformly without replacement (a control, no paper).

    The draw depends on seed and N alone: the same on every device and at every place of a batch,
    and a larger budget keeps all tokens of a smaller one.
    """

    name: ClassVar[str] = "random"
    license: ClassVar[str] = "none needed"
    fidelity: ClassVar[Fidelity] = "control"

    seed: int = option(0, low=0, high=2**63 - 1, doc="another seed, another draw")

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        b, n, _ = tokens.features.shape
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))[:k]
        return Selection(drawn.to(tokens.features.device, non_blocking=True).expand(b, k))
