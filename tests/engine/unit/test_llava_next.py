"""LLaVA-NeXT's front half: token counts and places against vLLM's and transformers' own code."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextProcessor
from vllm.multimodal.parse import ImageProcessorItems, ImageSize

from fsr_vllm.engine.families import family_of
from fsr_vllm.engine.families.llava_next import LLAVA_NEXT
from tests.checkpoints import PATCH, PINPOINTS, SIDE, TILE

from .next_parts import EXTREME, NARROW, PADDED, PUBLISHED, Info, config, image_processor, packed


class Items:
    """vLLM's items of a prompt, of images whose size alone matters."""

    def __init__(self, sizes):
        self.sizes = sizes

    def get(self, index):
        return self.sizes[index]

    def get_image_size(self, index):
        return ImageSize(*self.sizes[index])


def sizes(count):
    draw = random.Random(0)
    return [(draw.randint(20, 3000), draw.randint(20, 3000)) for _ in range(count)]


@pytest.mark.parametrize(("tile", "pinpoints"), [(336, PUBLISHED), (TILE, PINPOINTS)])
def test_the_number_of_tokens_is_vllms_and_transformers(tile, pinpoints):
    info, asked = Info(config(tile, pinpoints)), [*sizes(400), *EXTREME, PADDED, NARROW]
    found = [LLAVA_NEXT.total(info, Items(asked), place, {}) for place in range(len(asked))]
    processor = SimpleNamespace(
        image_processor=image_processor(tile, pinpoints),
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    for name in ("_get_number_of_features", "_get_unpadded_features"):
        setattr(processor, name, getattr(LlavaNextProcessor, name).__get__(processor))
    theirs = LlavaNextProcessor._get_num_multimodal_tokens(
        processor, [(height, width) for width, height in asked], size={"shortest_edge": tile}
    )
    assert found == theirs["num_image_tokens"]
    # Counted by hand, too: a box for every row.
    assert found == [len(LLAVA_NEXT.boxes(info, size)) for size in asked]
    full = [(width, height) for height, width in pinpoints]
    most = max(len(LLAVA_NEXT.boxes(info, size)) for size in full)
    assert max(found) <= LLAVA_NEXT.most_tokens(info.hf_config) == most
    assert len(set(found)) > 10


def test_the_published_checkpoints_have_at_most_2928_tokens():
    assert LLAVA_NEXT.most_tokens(config(336, PUBLISHED)) == 2928


def test_an_image_without_its_pixels_has_no_number_of_tokens():
    assert LLAVA_NEXT.total(Info(config()), ImageProcessorItems([None]), 0, {}) is None


@pytest.mark.parametrize(
    "size", [(700, 400), (400, 700), (500, 500), (300, 90), (301, 77), (168, 168), (90, 301)]
)
def test_boxes_are_where_the_pixels_of_each_row_come_from(size):
    hf_config = config()
    boxes = LLAVA_NEXT.boxes(Info(hf_config), size)
    # Red tells a pixel's column, green its row.
    x, y = np.meshgrid(np.linspace(0, 250, size[0]), np.linspace(0, 250, size[1]))
    picture = Image.fromarray(np.stack([x, y, 0 * x + 100], -1).astype(np.uint8))
    processor = image_processor(TILE, PINPOINTS, do_normalize=False, do_rescale=False)
    done = processor([picture], return_tensors="pt")
    cells = (
        done["pixel_values"][0].float().unflatten(-1, (SIDE, PATCH)).unflatten(-3, (SIDE, PATCH))
    )
    cells = cells.mean((-3, -1)).flatten(2).transpose(1, 2)  # (tiles, patches, colours)
    seen, newline = torch.cat([cells, torch.zeros(*cells.shape[:2], 1)], -1), torch.ones(4)
    (rows,), _ = packed(hf_config, [seen], done["image_sizes"], newline)
    assert len(rows) == len(boxes)
    whole = 0
    for row, box in zip(rows, boxes, strict=True):
        assert (box is None) == bool(row[3])
        if box is None or row[2] < 99:  # patches at an edge show padding too
            continue
        whole += 1
        left, top, right, bottom = box
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        centre = [250 * (left + right) / 2 / size[0], 250 * (top + bottom) / 2 / size[1]]
        assert np.abs(row[:2].numpy() - centre).max() < 4
    assert whole > 0.6 * len(rows)


def test_what_is_not_supported_says_why():
    assert LLAVA_NEXT.unsupported(config()) is None
    layers = LLAVA_NEXT.unsupported(config(vision_feature_layer=[-2, -5]))
    assert "several vision feature layers" in layers
    full = config()
    full.vision_feature_select_strategy = "full"
    assert "vision_feature_select_strategy default only" in LLAVA_NEXT.unsupported(full)
    other = config()
    other.vision_config.model_type = "siglip_vision_model"
    assert "siglip_vision_model vision tower" in LLAVA_NEXT.unsupported(other)
    assert family_of(["LlavaNextForConditionalGeneration"]) is LLAVA_NEXT
