"""Fails when a name of vLLM that `fsr_vllm/compat.py` touches has moved; each test says which."""

import argparse
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import fsr_vllm
from fsr_vllm import activation, cli_args, plugin
from fsr_vllm.compat import load, plugins
from fsr_vllm.compat.engine_args import with_overrides
from fsr_vllm.compat.errors import request_error
from fsr_vllm.compat.load import watch_load
from fsr_vllm.compat.model import weight_source
from fsr_vllm.compat.plugins import AUTO_GROUPS, ENDPOINT_GROUP, enable_plugins
from fsr_vllm.compat.processing import stock_factories


def parameters(function):
    return list(inspect.signature(inspect.unwrap(function)).parameters)


def test_parts_of_an_offline_engine():
    from vllm.distributed.parallel_state import GroupCoordinator, get_tp_group
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.engine.llm_engine import LLMEngine

    assert "self.renderer" in inspect.getsource(LLMEngine.__init__)
    assert parameters(BaseRenderer.get_mm_processor) == ["self"]
    assert parameters(default_weight_loader) == ["param", "loaded_weight"]
    assert callable(get_tp_group) and isinstance(GroupCoordinator.is_first_rank, property)


def test_engine_args():
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    assert parameters(EngineArgs.add_cli_args) == ["parser"]
    assert parameters(EngineArgs.from_cli_args)[-1:] == ["args"]
    assert parameters(EngineArgs.create_model_config) == ["self"]
    assert issubclass(AsyncEngineArgs, EngineArgs)
    for name in ("additional_config", "hf_overrides", "worker_extension_cls"):
        assert name in EngineArgs.__dataclass_fields__


def test_renderer():
    from vllm.renderers import online_renderer

    hooked = online_renderer.OnlineRenderer.preprocess_chat
    assert inspect.iscoroutinefunction(inspect.unwrap(hooked))
    assert parameters(hooked)[:3] == ["self", "request", "messages"]
    completion = online_renderer.OnlineRenderer.preprocess_completion
    assert parameters(completion)[:2] == ["self", "request"]
    assert "validate_request_mm_kwargs" in inspect.getsource(online_renderer)
    assert parameters(online_renderer.validate_request_mm_kwargs)[0] == "mm_processor_kwargs"


def test_request_error_is_a_client_error_with_a_field():
    from vllm.exceptions import VLLMValidationError

    error = request_error("fsr_budget is wrong", "fsr_budget")
    assert isinstance(error, VLLMValidationError) and isinstance(error, ValueError)
    assert error.parameter == "fsr_budget" and "is wrong" in str(error)


def test_processor_hooks():
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration
    from vllm.multimodal.inputs import MultiModalFieldConfig
    from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs

    factories = stock_factories(LlavaForConditionalGeneration)
    assert (
        callable(factories.info)
        and callable(factories.processor)
        and callable(factories.dummy_inputs)
    )
    assert parameters(BaseMultiModalProcessor._get_cache_missing_items) == [
        "self",
        "cache",
        "mm_data_items",
        "mm_hashes",
    ]
    assert parameters(BaseMultiModalProcessor._get_prompt_updates)[:2] == ["self", "mm_items"]
    assert "mm_items" in parameters(BaseMultiModalProcessor._apply_hf_processor_main)
    assert "keep_on_cpu" in parameters(MultiModalFieldConfig.batched)
    assert {"mm_data_items", "hf_processor_mm_kwargs"} <= set(ProcessorInputs.__dataclass_fields__)
    assert parameters(ProcessorInputs.get_mm_hashes)[0] == "self"
    assert parameters(BaseMultiModalProcessor.get_dummy_inputs)[0] == "self"


def test_model_parts():
    from vllm.distributed.parallel_state import GroupCoordinator
    from vllm.model_executor.layers.attention import MMEncoderAttention
    from vllm.model_executor.models import clip, llava
    from vllm.model_executor.models.llama import LlamaForCausalLM

    assert "self.attn(query_states, key_states" in inspect.getsource(clip.CLIPAttention.forward)
    attention = inspect.getsource(MMEncoderAttention.__init__)
    assert "self.num_heads" in attention and "self.scale" in attention
    assert "feature_select_strategy" in parameters(clip.CLIPVisionModel.forward)
    assert {"vision_tower", "multi_modal_projector", "language_model"} <= set(
        inspect.getsource(llava.LlavaForConditionalGeneration.__init__)
        .replace("=", " ")
        .replace(".", " ")
        .split()
    )
    assert "input_ids" in parameters(LlamaForCausalLM.embed_input_ids)
    assert parameters(GroupCoordinator.broadcast)[1:3] == ["input_", "src"]
    source = weight_source("somewhere", "c0ffee", "prefix.")
    assert (source.model_or_path, source.revision, source.prefix) == (
        "somewhere",
        "c0ffee",
        "prefix.",
    )
    from vllm.model_executor.model_loader import default_loader

    assert '"secondary_weights"' in inspect.getsource(default_loader)


def test_collectives_and_tokenizer():
    import vllm.distributed as distributed
    from vllm.tokenizers import cached_tokenizer_from_config

    for name in (
        "tensor_model_parallel_all_reduce",
        "tensor_model_parallel_all_gather",
        "get_tensor_model_parallel_world_size",
    ):
        assert callable(getattr(distributed, name))
    assert callable(cached_tokenizer_from_config)


def test_endpoint_plugin_protocol():
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    from fsr_vllm.server import FsrEndpointPlugin

    assert isinstance(FsrEndpointPlugin(), EndpointPlugin)


def test_groups_that_load_by_themselves():
    import vllm.plugins as plugins

    groups = {value for name, value in vars(plugins).items() if name.endswith("_GROUP")}
    assert groups == {*AUTO_GROUPS, ENDPOINT_GROUP}


def test_only_compat_names_private_parts_of_vllm():
    """Our subclasses may override single-underscore names of vLLM; calling and patching them is for
    compat alone.
    """
    for path in Path(fsr_vllm.__file__).parent.rglob("*.py"):
        text = path.read_text()
        if path.parent.name != "compat":
            assert "from vllm.v1" not in text and "import vllm.v1" not in text, path
            assert "monkeypatch" not in text and "setattr(EngineArgs" not in text, path


# --- choosing plugins -----------------------------------------------------------------------------


def entry(name):
    return SimpleNamespace(name=name)


@pytest.fixture
def groups(monkeypatch):
    found = {
        "vllm.general_plugins": ["fsr", "lora", "other"],
        "vllm.platform_plugins": ["board"],
        "vllm.endpoint_plugins": ["fsr", "other"],
    }
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: [entry(name) for name in found.get(group, [])]
    )


def test_naming_a_plugin_keeps_all_that_loaded_by_itself(groups, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")  # so that it is put back, whatever is written to it
    del os.environ["VLLM_PLUGINS"]
    enable_plugins(["fsr"])
    named = os.environ["VLLM_PLUGINS"].split(",")
    assert set(named) == {"lora", "board", "fsr"}  # not "other": that would open its endpoint
    enable_plugins(["fsr"])
    assert os.environ["VLLM_PLUGINS"].split(",") == named


def test_a_set_variable_is_only_added_to(groups, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora")
    enable_plugins(["fsr", "other"])
    assert os.environ["VLLM_PLUGINS"] == "lora,fsr,other"


def parse(*argv):
    parser = argparse.ArgumentParser()
    cli_args.add_cli_args(parser)
    return parser.parse_args(argv)


def test_plugin_option_takes_lists_and_repeats(groups, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    args = parse("--plugin", "fsr,lora", "--plugin", "other", "--fsr-budget", "64")
    assert args.plugin == ["fsr", "lora", "other"] and args.fsr_budget == 64


def test_another_package_may_have_brought_the_option(groups):
    parser = argparse.ArgumentParser()
    parser.add_argument("--plugin")
    cli_args.add_cli_args(parser)
    assert parser.parse_args(["--plugin", "anything"]).plugin == "anything"


def test_options_become_additional_config_beside_the_users_own(groups, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "fsr")
    args = parse("--fsr-max-budget", "128", "--fsr-detail-budgets", '{"low": 16}')
    args.additional_config = {"theirs": 1, "fsr": {"method": "random", "max_budget": 5}}
    cli_args.merge_cli_args(args)
    cli_args.merge_cli_args(args)  # child processes do it again
    fsr = {"method": "random", "max_budget": 128, "detail_budgets": {"low": 16}}
    assert args.additional_config == {"theirs": 1, "fsr": fsr}


@pytest.mark.parametrize(
    "argv", [("--fsr-adaptive",), ("--fsr-adaptive", "288:64"), ("--fsr-adaptive", "m")]
)
def test_adaptive_without_bounds_is_an_error_of_the_command_line(groups, monkeypatch, capsys, argv):
    monkeypatch.setenv("VLLM_PLUGINS", "fsr")
    with pytest.raises(SystemExit):
        parse(*argv)
    assert "--fsr-adaptive" in (said := capsys.readouterr().err) and "LOW:HIGH" in said
    assert parse("--fsr-adaptive", "64:288").fsr_adaptive == "64:288"


def test_adaptive_is_refused_where_there_is_no_load_to_follow(tmp_path):
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    settings = {"fsr": {"adaptive": "64:288"}}
    with pytest.raises(ValueError, match="needs a server"):
        activation.put_settings(EngineArgs(str(tmp_path), additional_config=settings))
    with pytest.raises(ValueError, match="--disable-log-stats"):
        activation.put_settings(
            AsyncEngineArgs(str(tmp_path), additional_config=settings, disable_log_stats=True)
        )


def test_load_is_read_where_vllm_records_its_statistics(monkeypatch):
    from vllm.v1.metrics import loggers
    from vllm.v1.metrics.stats import SchedulerStats

    stock = inspect.unwrap(loggers.StatLoggerManager.record)
    assert parameters(stock)[:2] == ["self", "scheduler_stats"]
    assert "engine_idx" in parameters(stock)
    assert "disable_log_stats" in plugin_fields()
    # Both are put back afterwards, whatever is done to them here.
    monkeypatch.setattr(loggers.StatLoggerManager, "record", stock)
    monkeypatch.setattr(loggers.StatLoggerManager, "_fsr_wrapped", False, raising=False)
    monkeypatch.setattr(load, "_load_readers", [])
    seen, manager = [], object.__new__(loggers.StatLoggerManager)
    manager.stat_loggers = []
    for _ in range(2):  # every engine made in this process calls it
        watch_load(lambda *figures: seen.append(figures))
    stats = SchedulerStats(
        num_running_reqs=3, num_waiting_reqs=2, num_skipped_waiting_reqs=1, kv_cache_usage=0.5
    )
    manager.record(scheduler_stats=stats, iteration_stats=None, mm_cache_stats=None, engine_idx=1)
    manager.record(stats, None)
    manager.record(scheduler_stats=None, iteration_stats=None)
    assert seen == [(1, 3, 3, 0.5), (0, 3, 3, 0.5)]


def plugin_fields():
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs.__dataclass_fields__


def test_settings_that_are_no_object_are_refused():
    for value in ("64", 64, ["budget"]):
        with pytest.raises(ValueError, match="must be an object"):
            activation.put_settings(SimpleNamespace(additional_config={"fsr": value}))


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
    code = "import sys, fsr_vllm.plugin; print(sorted({'torch', 'vllm', 'transformers', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_registering_twice_wraps_once():
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    wrapped = EngineArgs.create_model_config
    plugin.register()
    assert EngineArgs.create_model_config is wrapped
