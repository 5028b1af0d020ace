"""Control: no selection at all, the first K tokens in raster order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Fidelity, Method, Selection, VisualTokens


@dataclass
class NoSelection(Method):
    """Truncation: keeps the first K tokens of the raster, whatever they show (a control, no paper)."""

    name: ClassVar[str] = "none"
    license: ClassVar[str] = "none needed"
    fidelity: ClassVar[Fidelity] = "control"

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        features = tokens.features
        return Selection(torch.arange(k, device=features.device).expand(features.shape[0], k))
