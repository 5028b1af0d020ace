"""LLaVA-NeXT's worker half, on a model that does not exist but for vLLM's merge of tiles."""

import contextlib
from dataclasses import replace

import pytest
import torch
from PIL import Image
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration

from fsr_vllm.engine.encoder import Encoder
from fsr_vllm.engine.families.llava_next import LLAVA_NEXT, LlavaNextWorker
from fsr_vllm.engine.feature_cache import FeatureCache
from fsr_vllm.engine.stats import Counts
from fsr_vllm.engine.types import ImageInput
from fsr_vllm.engine.wire import pack_plan
from fsr_vllm.params import ImagePlan
from tests.checkpoints import PINPOINTS, SIDE, TILE

from .next_parts import NARROW, PADDED, Info, config, image_processor, packed


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
    pictures = [
        Image.new("RGB", size, color=(40 + place, 0, 0)) for place, size in enumerate(shapes)
    ]
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


def test_images_of_every_shape_come_out_of_the_cache_as_they_went_in(encoded):
    half, images, _, found = encoded
    half.hook.cheap = frozenset({"saliency"})
    encoder = Encoder(half, FeatureCache(1 << 20), Counts())
    half.hook.signals = Hook(sum(TILES)).signals
    first = encoder.encode(images, ALL)
    again = encoder.encode(images[::-1], ALL)[::-1]
    for one, other, known in zip(first, again, found, strict=True):
        assert torch.equal(one.patches, known.patches)
        assert torch.allclose(one.rows, other.rows, atol=1e-5)
        assert torch.equal(one.signals["saliency"], other.signals["saliency"])
    assert encoder.cache.stats()["feature_entries"] == len(SHAPES)
    # A hit beside a miss.
    new = replace(images[0], key=b"n" * 16)
    half.hook.signals = Hook(TILES[0]).signals
    mixed = encoder.encode([images[3], new, images[1]], ALL)
    for one, place in zip(mixed, (3, 0, 1), strict=True):
        assert torch.allclose(one.rows, found[place].rows, atol=1e-5)
        assert torch.equal(one.patches, found[place].patches)
    assert half.model.runs[-2:] == [sum(TILES), TILES[0]]
