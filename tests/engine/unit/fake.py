"""A family without a model: images of tiles, no square grid, newline rows that are no candidates.

An image is (tiles, patches per row, features): each tile's patches lie in rows of the grid, each of
which ends in a newline row. So no number of an image follows from that of another.
"""

from __future__ import annotations

import torch

from fsr_vllm.engine.attention_hook import AttentionLayout
from fsr_vllm.engine.families.base import Family, WorkerHalf
from fsr_vllm.engine.types import EncodedImage, ImageFeatures, ImageInput
from fsr_vllm.engine.wire import unpack_plan

WIDTH = 6


class Hook:
    """Stands where AttentionHook does: the fake tower forms its signals itself."""

    cheap = frozenset({"saliency"})


class FakeWorker(WorkerHalf):
    def __init__(self, model=None):
        super().__init__(model)
        self.hook = Hook()
        self.runs = []  # how many images each run of the tower had, and the signals asked for

    def attention_layout(self):
        return AttentionLayout([torch.nn.Identity()], 1)

    def inputs(self, kwargs, plans):
        known = [unpack_plan(packed) for packed in plans]
        pixels = zip(kwargs["tiles"], kwargs["grids"], strict=True)
        return [
            ImageInput({"tiles": tiles, "grid": grid}, plan, key)
            for (tiles, grid), (key, plan) in zip(pixels, known, strict=True)
        ]

    def features(self, images, wanted):
        self.runs.append((len(images), wanted))
        return [
            ImageFeatures(
                {
                    "tower": image.pixels["tiles"] * 2,
                    "grid": torch.tensor(image.pixels["grid"]),
                    **{name: image.pixels["tiles"].sum(-1) for name in wanted},
                }
            )
            for image in images
        ]

    def rows(self, features, wanted):
        return [self._rows(each.tensors) for each in features]

    def _rows(self, tensors):
        tower = tensors["tower"]  # (T, P, D)
        height, width = tensors["grid"].tolist()
        tiles, patches = tower.shape[:2]
        assert patches == height * width
        signals = {k: v for k, v in tensors.items() if k not in ("tower", "grid")}
        rows = self.place_tiles(tower + 1, width, fill=-7.0)
        known = torch.arange(tiles * patches).view(tiles, patches, 1).double()
        order = self.place_tiles(known, width, fill=-1.0)[:, 0].long()
        places = [(order // patches == tile) & (order >= 0) for tile in range(tiles)]
        return EncodedImage(
            rows=rows,
            signals={
                name: self.place_tiles(v[..., None], width, 0.0)[:, 0]
                for name, v in signals.items()
            },
            groups=tuple(place.nonzero()[:, 0] for place in places),
            grids=((height, width),) * tiles,
            tower=tower.reshape(tiles * patches, -1),
            patches=torch.stack([order // patches, order % patches], 1),
        )

    @staticmethod
    def place_tiles(values, width, fill):
        tiles, patches, depth = values.shape
        lines = values.reshape(tiles * patches // width, width, depth)
        newline = torch.full_like(lines[:, :1], fill)
        return torch.cat([lines, newline], 1).reshape(-1, depth)

    def place(self, image, per_patch):
        order = image.patches[:, 0] * (image.patches[:, 1].max() + 1) + image.patches[:, 1]
        placed = torch.zeros(len(image.rows), dtype=per_patch.dtype)
        inside = image.patches[:, 0] >= 0
        placed[inside] = per_patch[order[inside]]
        return placed


class Fake(Family):
    architecture = "FakeForConditionalGeneration"
    signals = frozenset({"saliency", "grid", "metric"})

    def stock_class(self):
        raise NotImplementedError

    def worker_half(self):
        return FakeWorker

    def unsupported(self, hf_config):
        return None

    def most_tokens(self, hf_config):
        return 1000

    def total(self, info, images, index, options):
        return images[index]

    def boxes(self, info, size):
        raise NotImplementedError


FAKE = Fake()


def image(tiles, grid, plan, key=None, seed=0):
    """One input of the fake family, of `tiles` tiles of grid = (height, width) patches."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tiles, grid[0] * grid[1], WIDTH, generator=generator)
    return ImageInput({"tiles": values, "grid": grid}, plan, key)


def total(tiles, grid):
    """Rows of such an image, newlines included."""
    return tiles * grid[0] * (grid[1] + 1)
