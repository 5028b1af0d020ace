"""LLaVA-1.5's front half against transformers' own image processor and config."""

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig

from fsr_vllm.engine.families import FAMILIES, family_of
from fsr_vllm.engine.families.llava import LLAVA

SIDE, PATCH = 6, 14


class Info:
    """Of vLLM's processing info, what the family asks for."""

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def get_hf_processor(self):
        return self

    def get_hf_config(self):
        return config()


def config(**changes):
    vision = CLIPVisionConfig(image_size=SIDE * PATCH, patch_size=PATCH)
    return LlavaConfig(vision_config=vision, text_config=LlamaConfig(), **changes)


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("size", [(700, 400), (400, 700), (500, 500)])
def test_boxes_are_where_the_pixels_of_each_patch_come_from(crop, size):
    edge = SIDE * PATCH
    processor = CLIPImageProcessor(
        size={"shortest_edge": edge} if crop else {"height": edge, "width": edge},
        crop_size=edge,
        do_center_crop=crop,
        do_normalize=False,
        do_rescale=False,
    )
    boxes = LLAVA.boxes(Info(processor), size)
    assert len(boxes) == SIDE * SIDE == LLAVA.most_tokens(config())
    # Red tells a pixel's column, green its row.
    x, y = np.meshgrid(np.linspace(0, 250, size[0]), np.linspace(0, 250, size[1]))
    picture = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    pixels = processor(picture, return_tensors="np")["pixel_values"][0]
    cells = pixels[:2].reshape(2, SIDE, PATCH, SIDE, PATCH).mean((2, 4))
    for place, (left, top, right, bottom) in enumerate(boxes):
        row, column = divmod(place, SIDE)
        centre = 250 * (left + right) / 2 / size[0], 250 * (top + bottom) / 2 / size[1]
        assert np.abs(cells[:, row, column] - centre).max() < 2


def test_what_is_not_supported_says_why():
    assert LLAVA.unsupported(config()) is None
    assert "several vision feature layers" in LLAVA.unsupported(
        config(vision_feature_layer=[-2, -5])
    )
    full = LLAVA.unsupported(config(vision_feature_select_strategy="full"))
    assert "vision_feature_select_strategy default only" in full
    other = config()
    other.vision_config.model_type = "siglip_vision_model"
    assert "siglip_vision_model vision tower" in LLAVA.unsupported(other)


def test_the_table_of_families():
    assert family_of(["Nothing", "LlavaForConditionalGeneration"]) is LLAVA
    assert family_of(["Qwen2ForCausalLM"]) is None
    name = "LlavaForConditionalGeneration"
    module, _, built = FAMILIES[name].partition(":")
    assert (module, built) == ("fsr_vllm.engine.families", f"Fsr{name}")
    import fsr_vllm.engine.families as families

    kind = getattr(families, built)
    assert kind is getattr(families, built) and kind.fsr_family is LLAVA
    assert issubclass(kind, LLAVA.stock_class()) and kind.__qualname__ == built
    with pytest.raises(AttributeError):
        _ = families.FsrNothing
