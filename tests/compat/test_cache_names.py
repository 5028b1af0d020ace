"""Fails when a name of vLLM that `fsr_vllm/compat_caches.py` touches has moved; each test says
which.
"""

import inspect

import torch

from fsr_vllm.compat.processing import (
    _INTERNAL_UUID,
    hf_kwargs_of,
    join_images,
    owned,
    split_images,
    with_items,
)
from fsr_vllm.compat.resets import _RUNNERS, on_runner_reset


def parameters(function):
    return list(inspect.signature(inspect.unwrap(function)).parameters)


def test_identities():
    from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs
    from vllm.renderers.base import BaseRenderer

    assert parameters(ProcessorInputs.get_mm_hashes) == ["self", "model_id", "hash_algorithm"]
    assert "model_id" in inspect.getsource(BaseMultiModalProcessor._get_mm_hashes)
    # The names of media that nobody hashed.
    assert 'f"{mm_req_id}-{modality}-{i}"' in inspect.getsource(BaseRenderer._process_mm_uuids)
    assert 'f"renderer{self.api_process_rank}-mm-' in inspect.getsource(
        BaseRenderer._process_multimodal
    )
    assert _INTERNAL_UUID.fullmatch("renderer0-mm-12-image-3")
    assert not _INTERNAL_UUID.fullmatch("my-renderer0-mm-12-image-3")


def test_names_that_clients_give_and_sizes_of_embeddings():
    import dataclasses

    from vllm.multimodal.parse import ImageEmbeddingItems
    from vllm.multimodal.processing import ProcessorInputs

    from fsr_vllm.compat.embeddings import embedding_rows

    assert "mm_uuid_items" in {field.name for field in dataclasses.fields(ProcessorInputs)}
    items = ImageEmbeddingItems([torch.zeros(3, 4), torch.zeros(5, 4)], expected_hidden_size=4)
    assert embedding_rows(items) == [3, 5]


def test_processor_step():
    from vllm.multimodal.parse import MultiModalDataItems
    from vllm.multimodal.processing import BaseMultiModalProcessor

    names = parameters(BaseMultiModalProcessor._apply_hf_processor_main)
    assert names.index("mm_items") + 1 == names.index("hf_kwargs")
    old, new = MultiModalDataItems({}), MultiModalDataItems({})
    args, kwargs = with_items((old, {"a": 1}), {}, new)
    assert args[0] is new and args[1] == {"a": 1} and kwargs == {}
    assert hf_kwargs_of((), {"mm_items": old, "hf_kwargs": {"b": 2}}) == {"b": 2}
    assert "validate=False" in inspect.getsource(BaseMultiModalProcessor._get_cache_missing_items)


def test_items_of_a_batch_come_apart_and_together():
    from transformers import BatchFeature
    from vllm.multimodal.inputs import MultiModalFieldConfig

    fields = {"pixel_values": MultiModalFieldConfig.batched("image")}
    batch = BatchFeature({"pixel_values": torch.arange(12.0).view(3, 2, 2)})
    items = split_images(batch, fields)
    kept, size = owned(items[1])
    assert (
        size == 16 == kept["pixel_values"].data.untyped_storage().nbytes()
    )  # not a view of all three
    joined = join_images([items[2], kept, items[2]])
    assert torch.equal(joined["pixel_values"], batch["pixel_values"][[2, 1, 2]])
    assert split_images(BatchFeature(), fields) == []


def test_resets_of_both_sides():
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.engine.core import EngineCore

    assert parameters(BaseRenderer.clear_mm_cache) == ["self"]
    source = inspect.getsource(BaseRenderer.__init__)
    assert (
        "make_async(" in source
        and "self.clear_mm_cache" in source
        and "self.mm_processor" in source
    )
    resets = inspect.getsource(EngineCore._reset_caches)
    assert "self.reset_mm_cache()" in resets and "self.reset_encoder_cache()" in resets


def test_runners_of_both_versions_have_the_resets():
    import importlib

    for module in _RUNNERS:
        runner = importlib.import_module(module).GPUModelRunner
        source = inspect.getsource(inspect.unwrap(runner.reload_weights))
        assert "self.reset_encoder_cache()" in source
        assert (
            parameters(runner.reset_encoder_cache) == parameters(runner.reset_mm_cache) == ["self"]
        )


def test_a_reset_of_a_runner_reaches_the_model(monkeypatch):
    import sys
    from types import SimpleNamespace

    class GPUModelRunner:
        def reset_encoder_cache(self):
            return "encoder"

        def reset_mm_cache(self):
            return "mm"

    class Model:
        forgot = 0

        def fsr_forget(self):
            self.forgot += 1

    monkeypatch.setitem(sys.modules, _RUNNERS[0], SimpleNamespace(GPUModelRunner=GPUModelRunner))
    first, second = Model(), Model()
    on_runner_reset(first)
    on_runner_reset(second)
    assert (GPUModelRunner().reset_encoder_cache(), GPUModelRunner().reset_mm_cache()) == (
        "encoder",
        "mm",
    )
    assert first.forgot == second.forgot == 2


def test_statistics_of_a_server():
    from vllm.distributed import get_pp_group
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient, MPClient

    assert {"method", "args"} <= set(parameters(AsyncLLM.collective_rpc))
    assert "engine_dead" in inspect.getsource(AsyncLLM.errored.fget)
    assert "self.renderer" in inspect.getsource(AsyncLLM.__init__)
    assert parameters(AsyncMPClient._call_utility_async) == ["self", "method", "args", "engine"]
    assert parameters(AsyncMPClient.collective_rpc_async) == [
        "self",
        "method",
        "timeout",
        "args",
        "kwargs",
    ]
    assert '"collective_rpc"' in inspect.getsource(AsyncMPClient.collective_rpc_async)
    assert "self.core_engines:" in inspect.getsource(MPClient.__init__)
    assert callable(get_pp_group)
