"""Control: K evenly spaced tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Fidelity, Method, Selection, VisualTokens
from .ops import region_bounds


@dataclass
class Uniform(Method):
    """K evenly spaced tokens: over the grid where it is given, else over the raster (a control, no
    paper).
    """

    name: ClassVar[str] = "uniform"
    uses: ClassVar[tuple[str, ...]] = ("grid",)
    license: ClassVar[str] = "none needed"
    fidelity: ClassVar[Fidelity] = "control"

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        b, n, _ = tokens.features.shape
        grid = tokens.grid or (1, n)
        top, bottom, left, right = region_bounds(k, grid, tokens.features.device)
        middle = (top + bottom - 1) // 2 * grid[1] + (left + right - 1) // 2
        return Selection(middle.expand(b, k))
