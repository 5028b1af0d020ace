"""Control: K evenly spaced tokens."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Method, Selection, VisualTokens, region_bounds


@dataclass
class Uniform(Method):
    """K evenly spaced tokens (a control, no paper).

    They are spaced over the grid where it is given, else over the raster.
    """

    name = "uniform"
    uses = ("grid",)
    license = "none needed"
    fidelity = "control"

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        b, n, _ = tokens.features.shape
        grid = tokens.grid or (1, n)
        top, bottom, left, right = region_bounds(k, grid, tokens.features.device)
        middle = (top + bottom - 1) // 2 * grid[1] + (left + right - 1) // 2
        return Selection(middle.expand(b, k))
