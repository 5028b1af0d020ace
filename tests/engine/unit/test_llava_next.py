"""LLaVA-NeXT without an engine: token counts and places against vLLM's and transformers' own code,
and the worker half on a model that does not exist.
"""

import contextlib
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.vision import get_vision_encoder_info
from vllm.multimodal.parse import ImageProcessorItems, ImageSize

from fsr_vllm.engine.families import family_of
from fsr_vllm.engine.families.llava_next import LLAVA_NEXT, LlavaNextWorker
from fsr_vllm.engine.types import ImageInput
from fsr_vllm.engine.wire import pack_plan
from fsr_vllm.params import ImagePlan
from tests.checkpoints import PATCH, PINPOINTS, SIDE, TILE

PUBLISHED = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
EXTREME = [(336, 336), (672, 672), (300, 20), (20, 300), (1000, 31), (1, 1), (2000, 12), (12, 2000)]
PADDED = (600, 20)  # (width, height): a ratio at which the tiles show padding alone
NARROW = (20, 600)  # and one of which only newlines are left of them


def config(tile=TILE, pinpoints=PINPOINTS, **changes):
    vision = CLIPVisionConfig(image_size=tile, patch_size=PATCH, num_hidden_layers=4)
    return LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(),
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="default",
        **changes,
    )


class Info(LlavaNextProcessingInfo):
    """vLLM's own, of a checkpoint that lies nowhere."""

    def __init__(self, hf_config):
        self.hf_config = hf_config

    def get_hf_config(self):
        return self.hf_config

    def get_vision_encoder_info(self):
        return get_vision_encoder_info(self.hf_config)


class Items:
    """vLLM's items of a prompt, of images whose size alone matters."""

    def __init__(self, sizes):
        self.sizes = sizes

    def get(self, index):
        return self.sizes[index]

    def get_image_size(self, index):
        return ImageSize(*self.sizes[index])


def image_processor(tile, pinpoints, **changes):
    return LlavaNextImageProcessor(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=pinpoints,
        **changes,
    )


def sizes(count):
    draw = random.Random(0)
    return [(draw.randint(20, 3000), draw.randint(20, 3000)) for _ in range(count)]


# --- the front half ------------------------------------------------------------------------------


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
    cells = done["pixel_values"][0].float().unflatten(-1, (SIDE, PATCH)).unflatten(-3, (SIDE, PATCH))
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


# --- the worker half -----------------------------------------------------------------------------


def packed(hf_config, values, image_sizes, newline):
    """Transformers' own order of the patches of each image's tiles."""
    return LlavaNextModel.pack_image_features(
        SimpleNamespace(config=hf_config), values, image_sizes, "default", image_newline=newline
    )


class Hook:
    """Stands where AttentionHook does: signals of a run over `tiles` tiles."""

    def __init__(self, tiles):
        count, patches = tiles, SIDE**2
        self.signals = {
            "saliency": torch.rand(count, patches),
            "keys": torch.rand(count, patches, 5),
            "last_query": torch.rand(count, 8),
            "last_key": torch.rand(count, patches + 1, 8),
            "attention": torch.rand(count, patches, patches),
        }

    @contextlib.contextmanager
    def reading(self, wanted):
        yield {name: self.signals[name] for name in wanted & self.signals.keys()}


class Model:
    """What the worker half reads of vLLM's model."""

    _merge_image_patch_embeddings = LlavaNextForConditionalGeneration._merge_image_patch_embeddings

    def __init__(self):
        self.config = config()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(4, 3, generator=generator)
        self.image_newline = torch.tensor([7.0, 8.0, 9.0])
        self.runs = []

    def vision_tower(self, pixels, feature_select_strategy):
        assert feature_select_strategy == "full"
        self.runs.append(len(pixels))
        scale = torch.arange(1, SIDE**2 + 2).view(1, -1, 1)
        return pixels.mean((1, 2, 3)).view(-1, 1, 1) * scale * torch.tensor([1.0, -1.0, 2.0, 0.5])

    def multi_modal_projector(self, values):
        return values @ self.weight


def given(*shapes):
    """What vLLM hands to the model for images of these (width, height): padded to equal tiles."""
    plans = [ImagePlan(100, 9 + place) for place in range(len(shapes))]
    packed_plans = [pack_plan(bytes([place + 1]) * 16, plan) for place, plan in enumerate(plans)]
    pictures = [Image.new("RGB", size, color=(40 + place, 0, 0)) for place, size in enumerate(shapes)]
    done = image_processor(TILE, PINPOINTS)(pictures, return_tensors="pt")
    return {"pixel_values": done["pixel_values"], "image_sizes": done["image_sizes"]}, packed_plans


SHAPES = [(300, 90), (100, 100), PADDED, NARROW, (90, 300)]
TILES = [4, 5, 4, 4, 4]
ALL = frozenset(
    ("saliency", "keys", "last_query", "last_key", "attention", "metric", "cls_row", "grid")
)


@pytest.fixture(scope="module")
def encoded():
    """The images of SHAPES encoded together, with the model and the hook."""
    half = LlavaNextWorker(Model())
    half.hook = Hook(sum(TILES))
    images = half.inputs(*given(*SHAPES))
    features = half.features(images, ALL)
    return half, images, features, half.rows(features, ALL)


def test_images_are_taken_apart_without_the_tiles_that_fill_up_a_batch(encoded):
    half, images, features, _ = encoded
    assert [len(image.pixels["pixel_values"]) for image in images] == TILES
    assert [image.size for image in images] == [(height, width) for width, height in SHAPES]
    assert [image.cost for image in images] == [tiles * SIDE**2 for tiles in TILES]
    assert [image.plan.keep for image in images] == [9, 10, 11, 12, 13]
    assert [image.key for image in images] == [bytes([place]) * 16 for place in range(1, 6)]
    assert half.model.runs == [sum(TILES)]
    assert [len(each.tensors["tower"]) for each in features] == TILES
    # Images of as many tiles come as one tensor, others as a list.
    kwargs, plans = given(*SHAPES)
    apart = {**kwargs, "pixel_values": list(kwargs["pixel_values"])}
    again = half.inputs(apart, plans)
    for one, other in zip(images, again, strict=True):
        assert torch.equal(one.pixels["pixel_values"], other.pixels["pixel_values"])


def test_rows_and_signals_come_in_transformers_own_order(encoded):
    half, images, features, found = encoded
    at = 0
    for image, each, one, tiles in zip(images, features, found, TILES, strict=True):
        tower = each.tensors["tower"]
        sizes_of = torch.tensor([image.size])
        newline = half.model.image_newline
        (rows,), _ = packed(
            half.model.config, [half.model.multi_modal_projector(tower[:, 1:])], sizes_of, newline
        )
        assert torch.equal(one.rows, rows)
        for name, width in (("saliency", 1), ("keys", 5)):
            signal = half.hook.signals[name][at : at + tiles].view(tiles, SIDE**2, width)
            (expected,), _ = packed(half.model.config, [signal], sizes_of, torch.zeros(width))
            assert torch.equal(one.signals[name].view(len(rows), width), expected), name
        (metric,), _ = packed(half.model.config, [tower[:, 1:]], sizes_of, torch.zeros(4))
        assert torch.equal(one.signals["metric"], metric)
        assert torch.equal(one.tower, tower[:, 1:].flatten(0, 1))
        at += tiles


def test_each_tile_is_a_group_of_what_is_left_of_its_patches(encoded):
    half, _, _, found = encoded
    for one, (width, height), tiles in zip(found, SHAPES, TILES, strict=True):
        boxes = LLAVA_NEXT.boxes(Info(half.model.config), (width, height))
        newlines = [place for place, box in enumerate(boxes) if box is None]
        grouped = torch.cat(one.groups).sort().values.tolist()
        assert grouped == sorted(set(range(len(boxes))) - set(newlines))
        assert len(one.groups) == len(one.grids) == tiles
        assert one.groups[0].tolist() == list(range(SIDE**2)) and one.grids[0] == (SIDE, SIDE)
        for tile, (group, grid) in enumerate(zip(one.groups, one.grids, strict=True)):
            assert (one.patches[group, 0] == tile).all()
            if not len(group):
                assert grid is None
                continue
            # The patches of a group are a rectangle of the tile, line by line.
            line, column = one.patches[group, 1] // SIDE, one.patches[group, 1] % SIDE
            lines, columns = line.unique().tolist(), column.unique().tolist()
            assert grid == (len(lines), len(columns))
            places = [(y, x) for y in lines for x in columns]
            assert list(zip(line.tolist(), column.tolist(), strict=True)) == places
        assert (one.patches[newlines] == -1).all()
    padded, narrow = found[2], found[3]
    assert [len(group) for group in padded.groups] == [SIDE**2, 0, 0, 0]
    assert len(padded.rows) == SIDE**2
    assert [len(group) for group in narrow.groups] == [SIDE**2, 0, 0, 0]
    assert len(narrow.rows) == SIDE**2 + 3 * SIDE


def test_what_is_told_of_a_tile_speaks_of_its_own_patches(encoded):
    half, _, features, found = encoded
    at = 0
    for one, each, tiles in zip(found, features, TILES, strict=True):
        for tile in range(tiles):
            inside = one.patches[one.groups[tile], 1].tolist()
            maps = half.hook.signals["attention"][at + tile]
            assert torch.equal(one.group_signals["attention"][tile], maps[inside][:, inside])
            keys = half.hook.signals["last_key"][at + tile]
            expected = keys[[0, *(1 + patch for patch in inside)]]
            assert torch.equal(one.group_signals["last_key"][tile], expected)
            query = half.hook.signals["last_query"][at + tile]
            assert torch.equal(one.group_signals["last_query"][tile], query)
            cls = half.model.multi_modal_projector(each.tensors["tower"][tile, 0])
            assert torch.allclose(one.group_signals["cls_row"][tile], cls)
        at += tiles


def test_a_value_per_patch_becomes_one_per_row(encoded):
    half, _, features, found = encoded
    for one, each in zip(found, features, strict=True):
        values = torch.rand(len(one.tower))
        placed = half.place(one, values)
        inside = one.patches[:, 0] >= 0
        expected = values.view(-1, SIDE**2)[one.patches[inside, 0], one.patches[inside, 1]]
        assert torch.equal(placed[inside], expected)
        assert (placed[~inside] == 0).all()
        assert len(each.tensors["tower"]) * SIDE**2 == len(values)


def test_what_no_method_reads_is_not_brought_in_order(encoded):
    half, _, features, _ = encoded
    (one, *_) = half.rows(features, frozenset({"saliency"}))
    assert set(one.signals) == {"saliency"} and one.group_signals == {}


def test_the_same_image_makes_the_same_rows_alone(encoded):
    half, images, features, found = encoded
    for place in (0, 3):
        (alone,) = half.rows([features[place]], ALL)
        assert torch.allclose(alone.rows, found[place].rows, atol=1e-5)
        assert torch.equal(alone.patches, found[place].patches)
    assert isinstance(images[0], ImageInput)
