"""Control: no selection at all, the first K tokens in raster order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Method, Selection, VisualTokens


@dataclass
class Truncate(Method):
    """The first K tokens of the raster, whatever they show (a control, no paper)."""

    name = "truncate"
    license = "none needed"
    fidelity = "control"

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        features = tokens.features
        return Selection(torch.arange(k, device=features.device).expand(features.shape[0], k))
