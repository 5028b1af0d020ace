"""LLaVA-NeXT with a CLIP tower: a base tile that shows the whole image, and a grid of tiles.

vLLM drops the patches of tiles that show padding alone, and puts a newline row behind each row of
the grid. Newline rows show nothing of the image, so they are no candidates: a pruned image keeps
them only where its budget is more than all its patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsr_vllm.compat.tiles import merged, stock_tokens
from fsr_vllm.compat.types import HfConfig, Items, Model, ProcessingInfo
from fsr_vllm.engine import anyres, clip_tower
from fsr_vllm.engine.attention_hook import AttentionLayout
from fsr_vllm.engine.clip_tower import side_of
from fsr_vllm.engine.families.base import Box, Family, WorkerHalf
from fsr_vllm.engine.types import EncodedImage, ImageFeatures, ImageInput
from fsr_vllm.engine.wire import unpack_plan

# Sizes of images whose order of rows is kept; an entry takes at most 100 kB.
KNOWN_SIZES = 256


class LlavaNext(Family):
    """The front half; an image's number of tokens follows from its size."""

    architecture = "LlavaNextForConditionalGeneration"
    one_size = False
    signals = clip_tower.SIGNALS

    def stock_class(self) -> type:
        from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration

        return LlavaNextForConditionalGeneration

    def worker_half(self) -> type[WorkerHalf]:
        return LlavaNextWorker

    def unsupported(self, hf_config: HfConfig) -> str | None:
        """Saliency is the attention of a CLIP tower's [CLS]; the merge needs whole grids."""
        why = ", whose [CLS] attention is the saliency of methods"
        return clip_tower.unsupported(self.architecture, hf_config, why)

    def most_tokens(self, hf_config: HfConfig) -> int:
        """Of an image that fills one of the resolutions; padding only makes it fewer."""
        side, tile = side_of(hf_config), hf_config.vision_config.image_size
        grids = [
            (height // tile * side, width // tile * side)
            for height, width in hf_config.image_grid_pinpoints
        ]
        return side**2 + max(rows * (columns + 1) for rows, columns in grids)

    def total(
        self, info: ProcessingInfo, images: Items, index: int, options: Mapping[str, Any]
    ) -> int | None:
        if images.get(index) is None:
            return None
        return stock_tokens(info, images.get_image_size(index))

    def boxes(self, info: ProcessingInfo, size: tuple[int, int]) -> list[Box | None]:
        """The base tile is the whole image, squeezed into a square; a newline shows nothing."""
        config, original = info.get_hf_config(), (size[1], size[0])
        side, tile = side_of(config), config.vision_config.image_size
        base = [[length * line / side for line in range(side + 1)] for length in original]
        layout = _layout(config, original)
        lines = anyres.edges(original, layout.tiles, tile, side)
        boxes: list[Box | None] = []
        for (y, x), rows, columns, newline in (
            (base, range(side), range(side), False),
            (lines, layout.rows, layout.columns, True),
        ):
            for row in rows:
                boxes += [(x[column], y[row], x[column + 1], y[row + 1]) for column in columns]
                boxes += [None] * newline
        return boxes


class _Order(NamedTuple):
    """Which patch each row of an image is; all images of one size have the same."""

    rows: Tensor  # (N,) int64: the patch, counted over all tiles; 0 for a newline
    newlines: Tensor  # places of the newline rows
    patches: Tensor  # (N, 2) int64: tile and patch, -1 for a newline
    groups: tuple[Tensor, ...]  # rows of each tile
    inside: tuple[Tensor, ...]  # patches of each tile that are among the rows
    grids: tuple[tuple[int, int] | None, ...]

    def place(self, per_patch: Tensor) -> Tensor:
        """Values (T, P, ...) of all tiles' patches as values per row, 0 at newlines."""
        values = per_patch.flatten(0, 1)[self.rows]
        values[self.newlines] = 0
        return values


class LlavaNextWorker(WorkerHalf):
    """The worker half: what is kept of an image is the tower's output, [CLS] rows included."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._order = lru_cache(KNOWN_SIZES)(self._ordered)

    def attention_layout(self) -> AttentionLayout:
        return clip_tower.attention_layout(self.model)

    def inputs(self, kwargs: Mapping[str, Any], plans: Sequence[Tensor]) -> list[ImageInput]:
        """Tiles that the image processor added to make all images of a prompt alike are left off.

        `pixel_values` are (B, T, 3, H, W), or a list of (T, 3, H, W) where images differ in T.
        """
        images = []
        values = zip(kwargs["pixel_values"], kwargs["image_sizes"], plans, strict=True)
        for pixels, shape, packed in values:
            key, plan = unpack_plan(packed)
            height, width = shape.tolist()
            tiles = pixels[: _layout(self.model.config, (height, width)).all_tiles]
            work = len(tiles) * side_of(self.model.config) ** 2
            images.append(ImageInput({"pixel_values": tiles}, plan, key, (height, width), work))
        return images

    def features(self, images: Sequence[ImageInput], wanted: frozenset[str]) -> list[ImageFeatures]:
        tiles = [image.pixels["pixel_values"] for image in images]
        with self.hook.reading(wanted) as signals:
            # "full" keeps the [CLS] row at 0; without it this is exactly what the stock model
            # projects.
            tower = self.model.vision_tower(torch.cat(tiles), feature_select_strategy="full")
        counts = [len(each) for each in tiles]
        parts = {name: value.split(counts) for name, value in {"tower": tower, **signals}.items()}
        return [
            ImageFeatures({name: of_image[place] for name, of_image in parts.items()}, image.size)
            for place, image in enumerate(images)
        ]

    def rows(self, features: Sequence[ImageFeatures], wanted: frozenset[str]) -> list[EncodedImage]:
        counts = [len(each.tensors["tower"]) for each in features]
        tower = torch.cat([each.tensors["tower"] for each in features])
        project = self.model.multi_modal_projector
        projected = project(tower[:, 1:]).split(counts)
        cls = project(tower[:, 0]).split(counts) if "cls_row" in wanted else None
        return [
            self._encoded(each, wanted, projected[place], None if cls is None else cls[place])
            for place, each in enumerate(features)
        ]

    def _encoded(
        self, features: ImageFeatures, wanted: frozenset[str], projected: Tensor, cls: Tensor | None
    ) -> EncodedImage:
        order, tensors = self._order(features.size), features.tensors
        patches = tensors["tower"][:, 1:]
        rows = order.place(projected)
        rows[order.newlines] = self.model.image_newline.to(rows.dtype)
        per_patch = {name: value for name, value in tensors.items() if name in wanted}
        of_group: dict[str, Sequence[Tensor]] = {}
        if "attention" in per_patch:
            maps = per_patch.pop("attention")
            of_group["attention"] = [
                each[inside][:, inside] for each, inside in zip(maps, order.inside, strict=True)
            ]
        if {"last_query", "last_key"} & per_patch.keys():
            of_group["last_query"] = list(per_patch.pop("last_query"))
            of_group["last_key"] = [
                torch.cat([each[:1], each[1:][inside]])
                for each, inside in zip(per_patch.pop("last_key"), order.inside, strict=True)
            ]
        if cls is not None:
            of_group["cls_row"] = list(cls)
        if "metric" in wanted:
            per_patch["metric"] = patches
        return EncodedImage(
            rows=rows,
            signals={name: order.place(value) for name, value in per_patch.items()},
            group_signals=of_group,
            groups=order.groups,
            grids=order.grids,
            tower=patches.flatten(0, 1),
            patches=order.patches,
        )

    def place(self, image: EncodedImage, per_patch: Tensor) -> Tensor:
        assert image.patches is not None
        tile, patch = image.patches.unbind(1)
        places = (tile * side_of(self.model.config) ** 2 + patch).clamp(min=0)
        return per_patch[places].masked_fill(tile < 0, 0)

    def _ordered(self, size: tuple[int, int]) -> _Order:
        """The order of rows of an image of (height, width): the stock merge of patches' numbers.

        It is found on the CPU, where counts are known without waiting for a device.
        """
        config, device = self.model.config, self.model.image_newline.device
        side, tiles = side_of(config), _layout(config, size).all_tiles
        numbers = torch.arange(tiles * side**2, dtype=torch.float64).view(tiles, -1, 1)
        newline = numbers.new_full((1,), -1)
        rows = merged(self.model, size, numbers, newline, "spatial_unpad")[:, 0].long()
        tile, patch = rows.div(side**2, rounding_mode="floor"), rows.remainder(side**2)
        groups = [(tile == number).nonzero()[:, 0] for number in range(tiles)]
        inside = [patch[group] for group in groups]
        high = [len(each.div(side, rounding_mode="floor").unique()) for each in inside]
        patches = torch.stack([tile, patch.where(tile >= 0, -1)], 1)
        return _Order(
            rows=rows.clamp(min=0).to(device),
            newlines=(rows < 0).nonzero()[:, 0].to(device),
            patches=patches.to(device),
            groups=tuple(group.to(device) for group in groups),
            inside=tuple(each.to(device) for each in inside),
            grids=tuple(
                (height, len(each) // height) if height else None
                for height, each in zip(high, inside, strict=True)
            ),
        )


def _layout(hf_config: HfConfig, size: tuple[int, int]) -> anyres.Layout:
    tile = hf_config.vision_config.image_size
    return anyres.layout(size, hf_config.image_grid_pinpoints, tile, side_of(hf_config))


LLAVA_NEXT = LlavaNext()
