"""LLaVA-1.5: the front half against transformers' image processor and config; the worker half."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig

from fsr_vllm.engine.families import FAMILIES, family_of
from fsr_vllm.engine.families.llava import LLAVA, LlavaWorker
from fsr_vllm.engine.types import ImageInput
from fsr_vllm.engine.wire import pack_plan
from fsr_vllm.params import ImagePlan

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


# --- the worker half ----------------------------------------------------------------------


class Hook:
    """Stands where AttentionHook does: signals of a batch, for the run inside."""

    def __init__(self, signals):
        self.signals, self.asked = signals, []

    @contextlib.contextmanager
    def reading(self, wanted):
        self.asked.append(wanted)
        yield {name: self.signals[name] for name in wanted}


class Model:
    """What the worker half reads of vLLM's model."""

    def __init__(self):
        self.config = config()
        self.runs = []
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(4, 3, generator=generator)

    def vision_tower(self, pixels, feature_select_strategy):
        assert feature_select_strategy == "full"
        self.runs.append(len(pixels))
        scale = torch.arange(1, SIDE * SIDE + 2).view(1, -1, 1)
        return pixels.mean((1, 2, 3)).view(-1, 1, 1) * scale * torch.tensor([1.0, -1.0, 2.0, 0.5])

    def multi_modal_projector(self, values):
        return values @ self.weight


def worker(count):
    n = SIDE * SIDE
    signals = {
        "saliency": torch.rand(count, n),
        "last_query": torch.rand(count, 8),
        "last_key": torch.rand(count, n + 1, 8),
        "attention": torch.rand(count, n, n),
    }
    half = LlavaWorker(Model())
    half.hook = Hook(signals)
    return half, signals


def test_images_are_taken_apart_with_their_keys_and_plans():
    half, _ = worker(2)
    plans = [ImagePlan(36, 4, "fsr"), ImagePlan(36, 36)]
    packed = [pack_plan(b"k" * 16, plans[0]), pack_plan(None, plans[1])]
    pixels = torch.rand(2, 3, 8, 8)
    images = half.inputs({"pixel_values": pixels}, packed)
    assert [image.plan for image in images] == plans
    assert [image.key for image in images] == [b"k" * 16, None]
    assert all(
        torch.equal(image.pixels["pixel_values"], own)
        for image, own in zip(images, pixels, strict=True)
    )


def test_rows_are_the_stock_models_and_every_signal_is_its_own_images():
    half, signals = worker(2)
    model, pixels = half.model, torch.rand(2, 3, 8, 8)
    images = [ImageInput({"pixel_values": each}, ImagePlan(36, 36)) for each in pixels]
    wanted = frozenset(signals)
    features = half.features(images, wanted)
    assert model.runs == [2]
    assert half.hook.asked == [wanted]
    tower = model.vision_tower(pixels, "full")
    for place, image in enumerate(half.rows(features, frozenset())):
        patches = tower[place, 1:]
        assert torch.equal(image.rows, model.multi_modal_projector(tower[:, 1:])[place])
        assert torch.equal(image.tower, patches)
        assert torch.equal(image.signals["metric"], patches)
        assert set(image.signals) == {"metric", "saliency"}
        assert torch.equal(image.signals["saliency"], signals["saliency"][place])
        assert set(image.group_signals) == {"last_query", "last_key", "attention"}
        for name, (value,) in image.group_signals.items():
            assert torch.equal(value, signals[name][place])
        assert image.grids == ((SIDE, SIDE),)
        assert image.groups == ()
        assert image.sizes == (SIDE * SIDE,)


def test_the_row_of_cls_is_projected_where_a_method_reads_it():
    half, _ = worker(1)
    image = ImageInput({"pixel_values": torch.rand(3, 8, 8)}, ImagePlan(36, 36))
    features = half.features([image], frozenset())
    (encoded,) = half.rows(features, frozenset({"cls_row"}))
    cls = features[0].tensors["tower"][0]
    assert torch.equal(encoded.group_signals["cls_row"][0], half.model.multi_modal_projector(cls))
    assert "cls_row" not in half.rows(features, frozenset({"saliency"}))[0].group_signals


def test_the_hook_is_told_the_towers_blocks_and_full_depth():
    half, _ = worker(1)
    ops = [torch.nn.Identity() for _ in range(3)]
    layers = [SimpleNamespace(self_attn=SimpleNamespace(attn=op)) for op in ops]
    encoder = SimpleNamespace(encoder=SimpleNamespace(layers=layers))
    half.model.vision_tower = SimpleNamespace(vision_model=encoder)
    layout = half.attention_layout()
    assert layout.layers == ops
    assert (layout.depth, layout.prefix) == (config().vision_config.num_hidden_layers, 1)
