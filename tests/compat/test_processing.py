"""What the plugin takes for granted of vLLM's processing of images, and of the resets of what it
keeps.
"""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fsr_vllm.compat.patching import reverted
from fsr_vllm.compat.processing import (
    _INTERNAL_UUID,
    hf_kwargs_of,
    image_hashes,
    join_images,
    mm_items_of,
    owned,
    processed_data_of,
    split_images,
    with_items,
)
from fsr_vllm.compat.resets import on_runner_reset, wrap_mm_cache_reset
from fsr_vllm.demo import demo_model


def picture(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def renderer():
    """vLLM's renderer of the bundled model, with both of vLLM's caches off, and its resets
    followed by `forgotten`.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers.registry import renderer_from_config

    config = EngineArgs(
        model=str(demo_model()), max_model_len=512, mm_processor_cache_gb=0,
        enable_prefix_caching=False,
    ).create_engine_config()  # fmt: skip
    with reverted():
        forgotten = []
        wrap_mm_cache_reset(forgotten.append)
        made = renderer_from_config(config)
        made.forgotten = forgotten
        yield made


@pytest.fixture
def applied(renderer, monkeypatch):
    """A function: what the processor is given for an image, and with which arguments it makes its
    main step.
    """
    processor, given = renderer.get_mm_processor(), {}
    apply, main = processor.apply, processor._apply_hf_processor_main

    def noted(inputs, *args, **kwargs):
        given["inputs"] = inputs
        return apply(inputs, *args, **kwargs)

    def noted_main(*args, **kwargs):
        given["step"] = (args, kwargs)
        given["result"] = main(*args, **kwargs)
        return given["result"]

    monkeypatch.setattr(processor, "apply", noted)
    monkeypatch.setattr(processor, "_apply_hf_processor_main", noted_main)
    token = processor.info.get_hf_config().image_token_index

    def run(image):
        renderer._process_multimodal([token], {"image": image}, None, {})
        return given["inputs"], given["step"], given["result"]

    return run


def test_an_image_is_known_again_where_vllm_names_it_after_the_request(renderer, applied):
    info = renderer.get_mm_processor().info
    found = []
    for image in (picture(), picture(), picture(1)):
        inputs, *_ = applied(image)
        (name,) = inputs.mm_uuid_items["image"]
        assert _INTERNAL_UUID.fullmatch(name)
        identities, (own,) = image_hashes(inputs, info)
        assert identities["image"] == [name]
        found.append((name, own))
    (first, one), (second, same), (_, other) = found
    assert first != second
    assert one == same != other
    assert not _INTERNAL_UUID.fullmatch("my-renderer0-mm-12-image-3")


def test_the_main_step_is_taken_apart_by_the_kind_of_its_arguments(applied):
    inputs, (args, kwargs), result = applied(picture())
    items = mm_items_of(args, kwargs)
    assert items is inputs.mm_data_items
    assert isinstance(hf_kwargs_of(args, kwargs), dict)
    assert "pixel_values" in processed_data_of(result)
    assert processed_data_of(([1], processed_data_of(result), True)) is processed_data_of(result)
    other = type(items)({})
    assert mm_items_of(*with_items(args, kwargs, other)) is other
    given = {"mm_items": items, "hf_kwargs": {"b": 2}}
    assert hf_kwargs_of((), given) == {"b": 2}
    assert with_items((items, {"a": 1}), {}, other) == ([other, {"a": 1}], {})


def test_items_of_a_batch_come_apart_and_together():
    from transformers import BatchFeature
    from vllm.multimodal.inputs import MultiModalFieldConfig

    fields = {"pixel_values": MultiModalFieldConfig.batched("image")}
    batch = BatchFeature({"pixel_values": torch.arange(12.0).view(3, 2, 2)})
    items = split_images(batch, fields)
    kept, size = owned(items[1])
    # Not a view of all three.
    assert size == 16 == kept["pixel_values"].data.untyped_storage().nbytes()
    joined = join_images([items[2], kept, items[2]])
    assert torch.equal(joined["pixel_values"], batch["pixel_values"][[2, 1, 2]])
    assert split_images(BatchFeature(), fields) == []


def test_both_ways_to_clear_a_front_ends_cache_tell_of_it(renderer):
    renderer.clear_mm_cache()
    assert renderer.forgotten == [renderer.mm_processor]

    async def later():
        await renderer._clear_mm_cache_async()  # bound when the renderer was made

    asyncio.run(later())
    assert renderer.forgotten == [renderer.mm_processor] * 2


def test_a_reset_of_all_caches_reaches_the_runners():
    from vllm.v1.engine.core import EngineCore

    class Core(EngineCore):
        def __init__(self):
            self.called = []

        def reset_prefix_cache(self, **kwargs):
            return True

        def reset_mm_cache(self):
            self.called.append("mm")

        def reset_encoder_cache(self):
            self.called.append("encoder")

    core = Core()
    core._reset_caches()
    assert core.called == ["mm", "encoder"]


class Model:
    """Stands for a model of ours in a worker."""

    forgot = 0

    def fsr_forget(self):
        self.forgot += 1


@pytest.mark.parametrize("module", ["gpu_model_runner", "gpu.model_runner"])
def test_a_reset_of_either_runner_reaches_the_models(module):
    import importlib

    kind = importlib.import_module(f"vllm.v1.worker.{module}").GPUModelRunner
    runner, cleared = object.__new__(kind), []
    runner.mm_budget = runner.pooling_runner = None
    runner.late_interaction_runner = SimpleNamespace(clear=lambda: None)
    runner.encoder_cache = SimpleNamespace(
        clear=lambda: cleared.append("encoder"),
        reset_encoder_cache=lambda: cleared.append("encoder"),
        reset_mm_cache=lambda: cleared.append("mm"),
    )
    first, second = Model(), Model()
    with reverted():
        on_runner_reset(first)
        on_runner_reset(second)
        runner.reset_encoder_cache()
        runner.reset_mm_cache()
    assert "encoder" in cleared
    assert first.forgot == second.forgot == 2
    runner.reset_mm_cache()
    assert first.forgot == 2
