"""What the plugin takes for granted of vLLM's objects, asked of real ones with small inputs."""

import asyncio
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fsr_vllm import plugin
from fsr_vllm.compat import errors
from fsr_vllm.compat.embeddings import embedding_rows
from fsr_vllm.compat.engine_args import GRPC_LAUNCHERS, with_overrides
from fsr_vllm.compat.errors import request_error
from fsr_vllm.compat.front_end import ask_workers, engine_has_died, image_limit
from fsr_vllm.compat.load import watch_load
from fsr_vllm.compat.model import load_parameter, weight_source
from fsr_vllm.compat.outputs import wrap_outputs
from fsr_vllm.compat.patching import reverted


def test_a_request_error_is_a_client_error_with_a_field():
    from vllm.exceptions import VLLMValidationError

    error = request_error("fsr_budget is wrong", "fsr_budget")
    assert isinstance(error, VLLMValidationError)
    assert isinstance(error, ValueError)
    assert error.parameter == "fsr_budget"
    assert "is wrong" in str(error)
    error = pickle.loads(pickle.dumps(error))
    assert type(error) is errors.FsrRequestError
    assert error.parameter == "fsr_budget"
    with pytest.raises(AttributeError):
        _ = errors.Nothing


def test_the_second_checkpoint_of_a_model_is_read_after_its_own(tmp_path):
    from safetensors.torch import save_file
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        save_file({name: torch.ones(1)}, str(tmp_path / name / "model.safetensors"))
    model = SimpleNamespace(secondary_weights=[weight_source(str(tmp_path / "second"), None, "p.")])
    config = SimpleNamespace(model=str(tmp_path / "first"), revision=None, hf_config=None)
    config.model_weights = None
    loader = DefaultModelLoader(LoadConfig(use_tqdm_on_load=False))
    assert [name for name, _ in loader.get_all_weights(config, model)] == ["first", "p.second"]


def test_a_parameter_is_filled_by_its_own_loader():
    plain = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    load_parameter(plain, torch.ones(2))
    assert plain.tolist() == [1, 1]
    plain.weight_loader = lambda parameter, tensor: parameter.data.fill_(7)
    load_parameter(plain, torch.ones(2))
    assert plain.tolist() == [7, 7]


def test_sizes_of_embeddings():
    from vllm.multimodal.parse import ImageEmbeddingItems

    items = ImageEmbeddingItems([torch.zeros(3, 4), torch.zeros(5, 4)], expected_hidden_size=4)
    assert embedding_rows(items) == [3, 5]


def test_the_limit_of_images():
    from vllm.config import MultiModalConfig

    for limits, images in (({}, 999), ({"image": 3}, 3)):
        config = SimpleNamespace(multimodal_config=MultiModalConfig(limit_per_prompt=limits))
        assert image_limit(config) == images
    assert image_limit(SimpleNamespace(multimodal_config=None)) == 0


def test_a_dead_engine_is_seen():
    from vllm.v1.engine.async_llm import AsyncLLM

    client = object.__new__(AsyncLLM)
    client.output_handler = None
    client.engine_core = SimpleNamespace(
        resources=SimpleNamespace(engine_dead=False), shutdown=lambda timeout: None
    )
    assert not engine_has_died(client)
    client.engine_core.resources.engine_dead = True
    assert engine_has_died(client)


def test_every_engine_is_asked():
    from vllm.v1.engine.core_client import AsyncMPClient

    class Core(AsyncMPClient):
        def __init__(self, engines):
            self.core_engines, self.asked = engines, []

        def __del__(self):
            """Nothing to shut down."""

        async def _call_utility_async(self, method, *args, engine):
            self.asked.append((method, args, engine))
            return [engine]

    async def rpc(method, args):
        return [method, args]

    core = Core([b"0", b"1"])
    client = SimpleNamespace(engine_core=core, collective_rpc=rpc)
    assert asyncio.run(ask_workers(client, "fsr_stats")) == [b"0", b"1"]
    expected = ("collective_rpc", ("fsr_stats", None, (), None))
    assert core.asked == [(*expected, b"0"), (*expected, b"1")]
    # vLLM's own call of one engine passes the same.
    core.asked.clear()
    core.core_engine = b"0"
    asyncio.run(core.collective_rpc_async("fsr_stats", None, (), None))
    assert core.asked == [(*expected, b"0")]
    client.engine_core = Core([b"0"])
    assert asyncio.run(ask_workers(client, "fsr_stats")) == ["fsr_stats", ()]


def test_load_is_read_where_vllm_records_its_statistics():
    from vllm.v1.metrics import loggers
    from vllm.v1.metrics.stats import SchedulerStats

    seen, manager = [], object.__new__(loggers.StatLoggerManager)
    manager.stat_loggers = []
    stats = SchedulerStats(
        num_running_reqs=3, num_waiting_reqs=2, num_skipped_waiting_reqs=1, kv_cache_usage=0.5
    )
    with reverted():
        for _ in range(2):  # every engine made in this process calls it
            watch_load(lambda *figures: seen.append(figures))
        manager.record(
            scheduler_stats=stats, iteration_stats=None, mm_cache_stats=None, engine_idx=1
        )
        manager.record(stats, None)
        manager.record(scheduler_stats=None, iteration_stats=None)
    assert seen == [(1, 3, 3, 0.5), (0, 3, 3, 0.5)]


def test_an_output_carries_what_was_kept():
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine import EngineCoreRequest, FinishReason
    from vllm.v1.engine.output_processor import RequestState

    from .scheduling import make_request

    features = make_request("r", [("a", 64, 576), ("b", 10, 10)]).mm_features
    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[1],
        mm_features=features,
        sampling_params=SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id="r",
    )
    with reverted():
        wrap_outputs()
        state = RequestState.from_new_request(
            tokenizer=None,
            request=request,
            prompt="",
            parent_req=None,
            request_index=0,
            queue=None,
            log_stats=False,
            stream_interval=1,
        )
        output = state.make_request_output([7], None, FinishReason.STOP, None)
    assert output.fsr_visual_tokens == (74, 586)


def test_grpc_launchers_are_still_there():
    from importlib.util import find_spec

    assert all(find_spec(name) for name in GRPC_LAUNCHERS)


def test_the_endpoint_plugin_is_one_to_vllm():
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    from fsr_vllm.server import FsrEndpointPlugin

    assert isinstance(FsrEndpointPlugin(), EndpointPlugin)


def upper(config):
    config["name"] = config["name"].upper()
    return config


def test_callable_overrides_are_composed_and_can_be_pickled():
    composed = with_overrides(upper, {"fsr_settings": "a"})
    composed = pickle.loads(pickle.dumps(with_overrides(composed, {"fsr_settings": "b"})))
    assert composed({"name": "x"}) == {"name": "X", "fsr_settings": "b"}
    assert with_overrides({"theirs": 1}, {"fsr_settings": "a"}) == {
        "theirs": 1,
        "fsr_settings": "a",
    }
    assert with_overrides(None, {"fsr_settings": "a"}) == {"fsr_settings": "a"}


def test_importing_the_plugin_is_cheap():
    heavy = {"torch", "vllm", "transformers", "pydantic"}
    code = f"import sys, fsr_vllm.plugin; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_registering_twice_wraps_once():
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    wrapped = EngineArgs.create_model_config
    plugin.register()
    assert EngineArgs.create_model_config is wrapped
