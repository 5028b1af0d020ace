"""Tiles of images of any ratio ("anyres", as LLaVA-NeXT and its relatives have them), as numbers.

An image is scaled, its ratio kept, to fit into the best of a checkpoint's resolutions, padded there
on both sides alike, and cut into square tiles. Of the grid of patches over all tiles, lines that
show padding alone are dropped. Sizes are (height, width), in pixels if nothing else is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Layout(NamedTuple):
    """Which patches of an image's tiles are kept."""

    tiles: tuple[int, int]  # rows and columns of tiles, beside the base tile
    rows: range  # of the grid of patches over all tiles: what is left without padding
    columns: range

    @property
    def all_tiles(self) -> int:
        """Tiles that the tower computes, the base tile included."""
        return 1 + self.tiles[0] * self.tiles[1]


def layout(
    size: tuple[int, int], resolutions: Sequence[Sequence[int]], tile: int, side: int
) -> Layout:
    """The tiles of `tile` pixels and `side` x `side` patches that an image of `size` is cut into.

    The rounding is that of transformers and vLLM: it decides how many tokens there are.
    """
    from transformers.image_processing_utils import select_best_resolution

    high, wide = select_best_resolution(size, [tuple(one) for one in resolutions])
    tiles = (high // tile, wide // tile)
    rows, columns = tiles[0] * side, tiles[1] * side
    height, width = size
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return Layout(tiles, range(padding, rows - padding), range(columns))
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return Layout(tiles, range(rows), range(padding, columns - padding))


def edges(size: tuple[int, int], tiles: tuple[int, int], tile: int, side: int) -> list[list[float]]:
    """Where the lines of the grid of patches over all tiles run in the original image: the y of
    each horizontal line, the x of each vertical one. Lines in the padding lie on its border.
    """
    target = (tiles[0] * tile, tiles[1] * tile)
    scale = min(most / length for most, length in zip(target, size, strict=True))
    lines = []
    for length, most, count in zip(size, target, tiles, strict=True):
        scaled = min(math.ceil(length * scale), most)
        start = (most - scaled) // 2
        step = tile / side
        places = [(line * step - start) / scaled * length for line in range(count * side + 1)]
        lines.append([min(max(place, 0.0), float(length)) for place in places])
    return lines
