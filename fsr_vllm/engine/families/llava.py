"""LLaVA-1.5 with a CLIP tower: one square grid of patches per image, [CLS] attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fsr_vllm.compat.types import HfConfig, Items, ProcessingInfo
from fsr_vllm.engine import clip_tower
from fsr_vllm.engine.attention_hook import AttentionLayout
from fsr_vllm.engine.clip_tower import side_of
from fsr_vllm.engine.families.base import Box, Family, WorkerHalf
from fsr_vllm.engine.types import EncodedImage, ImageFeatures, ImageInput, batched
from fsr_vllm.engine.wire import unpack_plan

# Signals of a whole image rather than one value per patch: maps, and the rows of [CLS].
_OF_GROUP = frozenset({"attention", "last_query", "last_key", "cls_row"})


class Llava(Family):
    """The front half; every image is resized to the tower's one size."""

    architecture = "LlavaForConditionalGeneration"
    one_size = True
    signals = clip_tower.SIGNALS

    def stock_class(self) -> type:
        from vllm.model_executor.models.llava import LlavaForConditionalGeneration

        return LlavaForConditionalGeneration

    def worker_half(self) -> type[WorkerHalf]:
        return LlavaWorker

    def unsupported(self, hf_config: HfConfig) -> str | None:
        """FSR's saliency is the attention of a CLIP tower's [CLS] to the patches."""
        return clip_tower.unsupported(self.architecture, hf_config)

    def most_tokens(self, hf_config: HfConfig) -> int:
        return side_of(hf_config) ** 2

    def total(
        self, info: ProcessingInfo, images: Items, index: int, options: Mapping[str, Any]
    ) -> int:
        return self.most_tokens(info.get_hf_config())

    def boxes(self, info: ProcessingInfo, size: tuple[int, int]) -> list[Box]:
        """CLIP's image processor scales the shorter edge to the tower's size and crops the centre;
        one that is configured without a crop squeezes the whole image into the square.
        """
        processor = info.get_hf_processor().image_processor
        width, height = map(float, size)
        left = top = 0.0
        if processor.do_center_crop:
            edge = min(width, height)
            left, top = (width - edge) / 2, (height - edge) / 2
            width = height = edge
        side = side_of(info.get_hf_config())
        x, y = (
            [start + length * step / side for step in range(side + 1)]
            for start, length in ((left, width), (top, height))
        )
        return [
            (x[column], y[row], x[column + 1], y[row + 1])
            for row in range(side)
            for column in range(side)
        ]


class LlavaWorker(WorkerHalf):
    """The worker half: what is kept of an image is the tower's output, [CLS] row included."""

    def attention_layout(self) -> AttentionLayout:
        return clip_tower.attention_layout(self.model)

    def inputs(self, kwargs: Mapping[str, Any], plans: Sequence[Tensor]) -> list[ImageInput]:
        images = []
        for pixels, packed in zip(kwargs["pixel_values"], plans, strict=True):
            key, plan = unpack_plan(packed)
            images.append(ImageInput({"pixel_values": pixels}, plan, key))
        return images

    def features(self, images: Sequence[ImageInput], wanted: frozenset[str]) -> list[ImageFeatures]:
        pixels = batched([image.pixels["pixel_values"] for image in images])
        with self.hook.reading(wanted) as signals:
            # "full" keeps the [CLS] row at 0; without it this is exactly what the stock model
            # projects.
            tower = self.model.vision_tower(pixels, feature_select_strategy="full")
        tensors = {"tower": tower, **signals}
        return [
            ImageFeatures({name: value[place] for name, value in tensors.items()})
            for place in range(len(images))
        ]

    def rows(self, features: Sequence[ImageFeatures], wanted: frozenset[str]) -> list[EncodedImage]:
        tower = batched([each.tensors["tower"] for each in features])
        patches = tower[:, 1:]
        rows = self.model.multi_modal_projector(patches)
        cls = self.model.multi_modal_projector(tower[:, 0]) if "cls_row" in wanted else None
        side = side_of(self.model.config)
        images = []
        for place, each in enumerate(features):
            signals = {name: value for name, value in each.tensors.items() if name != "tower"}
            of_group = {name: (signals.pop(name),) for name in _OF_GROUP & signals.keys()}
            if cls is not None:
                of_group["cls_row"] = (cls[place],)
            images.append(
                EncodedImage(
                    rows=rows[place],
                    signals={**signals, "metric": patches[place]},
                    group_signals=of_group,
                    grids=((side, side),),
                    tower=patches[place],
                )
            )
        return images


LLAVA = Llava()
