"""LLaVA-1.5 with a CLIP tower: one grid of patches per image, [CLS] attention, two-layer projector."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY

from fsr_vllm.compat.model import tower_attentions
from fsr_vllm.compat.processing import stock_factories
from fsr_vllm.engine.adapter import FsrModelMixin
from fsr_vllm.engine.processor import TAP_SIGNALS, FsrProcessorMixin, processor_factory

_STOCK = stock_factories(LlavaForConditionalGeneration)


def unsupported(hf_config: Any) -> str | None:
    """Why this checkpoint cannot be pruned: FSR's saliency is the attention of a CLIP tower's [CLS]
    to the patches.
    """
    tower = hf_config.vision_config.model_type
    if tower != "clip_vision_model":
        return f"LlavaForConditionalGeneration with a {tower} vision tower is not supported (supported: clip_vision_model)"
    if not isinstance(hf_config.vision_feature_layer, int):
        return "LlavaForConditionalGeneration with several vision feature layers is not supported"
    if hf_config.vision_feature_select_strategy != "default":
        return "LlavaForConditionalGeneration is supported with vision_feature_select_strategy default only"
    return None


def most_tokens(model_config: Any) -> int:
    """The most visual tokens that an image can have: every image is resized to the tower's one
    size.
    """
    vision = model_config.hf_config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


class LlavaFsrProcessor(FsrProcessorMixin):
    fsr_signals = TAP_SIGNALS

    def fsr_total(self, items: Any, index: int) -> int:
        return self.info.get_max_image_tokens()  # every image is resized to the tower's one size


@MULTIMODAL_REGISTRY.register_processor(
    processor_factory(_STOCK.processor, LlavaFsrProcessor, unsupported),
    info=_STOCK.info,
    dummy_inputs=_STOCK.dummy_inputs,
)
class FsrLlavaForConditionalGeneration(FsrModelMixin, LlavaForConditionalGeneration):
    fsr_unsupported = staticmethod(unsupported)

    def fsr_attention(self) -> tuple[list[torch.nn.Module], int]:
        return tower_attentions(self.vision_tower), self.config.vision_config.num_hidden_layers

    def fsr_tower(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # "full" keeps the [CLS] row at 0; without it this is exactly what the stock model projects.
        return self.vision_tower(pixel_values, feature_select_strategy="full")

    def fsr_project(self, tower: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tower[:, 1:], self.multi_modal_projector(tower[:, 1:])

    def fsr_cls_row(self, tower: torch.Tensor) -> torch.Tensor:
        return self.multi_modal_projector(tower[:, 0])
