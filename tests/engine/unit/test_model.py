"""The mixin before a stock model class, on a stock class and a family without weights."""

from types import SimpleNamespace

import pytest
import torch

from fsr_vllm.engine import model, selection
from fsr_vllm.engine.model import FsrModelMixin
from fsr_vllm.engine.text_encoder import WEIGHTS
from fsr_vllm.engine.types import ImageInput
from fsr_vllm.engine.wire import PLAN_FIELD, pack_plan
from fsr_vllm.params import SETTINGS_KEY, ImagePlan, ServerSettings

from .fake import FAKE, total
from .test_selection import plan

SHAPE = (1, (2, 3))
N = total(*SHAPE)


class Stock(torch.nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.language_model, self.calls, self.loaded = torch.nn.Identity(), [], []

    def load_weights(self, weights):
        self.loaded = [name for name, _ in weights]
        return set(self.loaded)

    def embed_multimodal(self, **kwargs):
        self.calls.append(kwargs)
        return "stock"


class Model(FsrModelMixin, Stock):
    fsr_family = FAKE


class Text(torch.nn.Module):
    """Stands where ClipText does: one parameter."""

    per_patch = True

    def __init__(self, path, sign, dummy):
        super().__init__()
        self.made, self.cleared, self.taken = (path, sign, dummy), 0, None
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def take(self, name, tensor):
        return "weight" if name == "weight" else None

    def check_loaded(self, names):
        self.taken = names

    def clear(self):
        self.cleared += 1


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(selection, "tensor_parallel_size", lambda: 1)
    monkeypatch.setattr(model, "has_vision_tower", lambda: True)
    monkeypatch.setattr(model, "ClipText", Text)


def made(active=True, at_once=1000, **settings):
    hf_config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=6))
    if active:
        values = {"text_encoder": "llm", "relevance_sign": 1, **settings}
        found = {"unsupported": values.pop("unsupported", None)}
        parsed = ServerSettings.parse(values).model_copy(update=found)
        setattr(hf_config, SETTINGS_KEY, parsed.model_dump_json())
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config, model="/nowhere"),
        load_config=SimpleNamespace(load_format="auto"),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=at_once),
    )
    return Model(vllm_config=config)


def given(*plans, keys=None):
    generator = torch.Generator().manual_seed(0)
    tiles = [torch.randn(1, 6, 6, generator=generator) for _ in plans]
    keys = keys or [None] * len(plans)
    packed = [pack_plan(key, each) for key, each in zip(keys, plans, strict=True)]
    return {"tiles": tiles, "grids": [SHAPE[1]] * len(plans), PLAN_FIELD: packed}


def test_inactive_every_call_is_the_stock_ones():
    plain = made(active=False)
    assert plain.fsr is None and plain.fsr_text is None
    assert plain.embed_multimodal(pixels=1) == "stock" and plain.calls == [{"pixels": 1}]


def test_where_start_up_found_that_it_cannot_prune_nothing_is_built():
    # Beside a budget of vLLM's own the rest of the settings stays unsettled.
    plain = made(unsupported="why", text_encoder="auto", relevance_sign="auto")
    assert plain.fsr is None and plain.fsr_text is None
    assert plain.embed_multimodal(pixels=1) == "stock"
    assert plain.load_weights([("a", None)]) == {"a"}
    assert not hasattr(plain, "supports_tower_connector_lora")


def test_pruned_images_are_ours_and_others_the_stock_models():
    ours = made(feature_cache_bytes=0)
    rows = ours.embed_multimodal(**given(plan(N, 3), ImagePlan(N, N)))
    assert [len(row) for row in rows] == [3, N] and not ours.calls
    whole = given(ImagePlan(N, N), ImagePlan(N, N))
    assert ours.embed_multimodal(**whole) == "stock"
    assert PLAN_FIELD not in ours.calls[0] and ours.calls[0]["tiles"] is whole["tiles"]
    counts = ours.fsr.stats()
    assert counts["tower_images"] == 4 and counts["images"] == 2 and "seconds_tower" in counts
    assert "feature_hits" not in counts


def test_unpruned_images_that_may_be_cached_are_ours():
    ours = made(feature_cache_bytes=1 << 14)
    for _ in range(2):
        rows = ours.embed_multimodal(**given(ImagePlan(N, N), keys=[b"k" * 16]))
        assert [len(row) for row in rows] == [N]
    assert ours.fsr.stats()["feature_hits"] == 1 and ours.fsr.stats()["tower_images"] == 1
    assert ours.embed_multimodal(**given(ImagePlan(N, N))) == "stock"


def test_the_tower_gets_no_more_at_once_than_an_unpruned_step_holds():
    ours = made(at_once=2 * N + 1, feature_cache_bytes=0)
    ours.embed_multimodal(**given(*[plan(N, 1)] * 5))
    assert [count for count, _ in ours.fsr.worker.runs] == [2, 2, 1]
    small = made(at_once=1, feature_cache_bytes=0)
    small.embed_multimodal(**given(*[plan(N, 1)] * 2))
    assert [count for count, _ in small.fsr.worker.runs] == [1, 1]


def test_an_image_counts_what_the_tower_computes_for_it():
    def costs(*works):
        images = [ImageInput({}, plan(N, 1), work=work) for work in works]
        return [[image.cost for image in run] for run in model.at_once(images, 100)]

    assert costs(60, 40, 1) == [[60, 40], [1]]
    assert costs(200, 99, 2, 1) == [[200], [99], [2, 1]]
    assert costs(0) == [[N]]


def test_new_weights_make_all_that_was_computed_stale():
    ours = made(text_encoder="none", feature_cache_bytes=1 << 14)
    ours.embed_multimodal(**given(plan(N, 3), keys=[b"k" * 16]))
    ours.load_weights([])
    ours.embed_multimodal(**given(plan(N, 3), keys=[b"k" * 16]))
    assert len(ours.fsr.worker.runs) == 2


def test_the_text_encoders_tensors_come_with_the_models():
    ours = made(text_encoder="/some/clip", relevance_sign=-1)
    assert ours.fsr_text.made == ("/some/clip", -1, False)
    assert ours.secondary_weights[0].prefix == WEIGHTS
    stream = [("a", 1), (WEIGHTS + "weight", 2), (WEIGHTS + "other", 3), ("b", 4)]
    assert ours.load_weights(iter(stream)) == {"a", "b", WEIGHTS + "weight"}
    assert ours.loaded == ["a", "b"] and ours.fsr_text.taken == {"weight"}
    assert ours.fsr_text.cleared == 1  # questions of the weights before
    assert ours.fsr.selector._inputs.relevance is ours.fsr_text
    none = made(text_encoder="none")
    assert none.fsr.selector._inputs.relevance is None and none.fsr.selector._inputs.words


def test_what_methods_may_need_beside_the_images(monkeypatch):
    codebook = torch.ones(2, 6)
    monkeypatch.setattr(model, "_prototypes", lambda model_config: codebook)
    ours = made(text_encoder="llm")
    inputs = ours.fsr.selector._inputs
    assert ours.fsr_text is None
    assert inputs.relevance is inputs.words
    assert inputs.prototypes is codebook


def test_lora_of_the_tower_is_not_offered():
    assert made().supports_tower_connector_lora is False
