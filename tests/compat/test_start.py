"""Fails when a name of vLLM that `fsr_vllm/compat_start.py` touches has moved; and what a start
leaves behind.
"""

import inspect
import os

import pytest

from fsr_vllm import activation, plugin
from fsr_vllm.compat.platform import device_memory
from fsr_vllm.compat.registry import IGNORING, put_stock_models, take_up
from fsr_vllm.engine.inputs import IGNORED_KEY
from fsr_vllm.engine.families import FAMILIES
from fsr_vllm.params import SETTINGS_KEY, ServerSettings

ARCHITECTURE = "LlavaForConditionalGeneration"


def test_registry():
    from vllm import ModelRegistry
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    assert isinstance(ModelRegistry.models, dict)
    assert {"module_name", "class_name"} <= set(_LazyRegisteredModel.__dataclass_fields__)
    from vllm.model_executor.model_loader import utils

    assert isinstance(utils._MODEL_ARCH_BY_HASH, dict)
    assert "self.models[model_arch] = model" in inspect.getsource(ModelRegistry.register_model)


def test_config_files():
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    stock = inspect.unwrap(FlexibleArgumentParser.load_config_file)
    assert list(inspect.signature(stock).parameters) == ["self", "file_path"]
    assert "self._option_string_actions" in inspect.getsource(stock)


def test_device_memory(monkeypatch):
    from vllm.platforms import current_platform

    assert callable(current_platform.get_device_total_memory)
    if current_platform.is_cpu():
        assert device_memory() is None


@pytest.fixture
def registry(monkeypatch):
    """vLLM's registry with the plugin's classes, put back afterwards."""
    from vllm import ModelRegistry

    monkeypatch.setenv(IGNORING, "0")
    plugin.register()
    yield ModelRegistry
    take_up(FAMILIES)


def registered(registry):
    return registry.models[ARCHITECTURE].class_name


def test_children_of_a_front_end_that_ignores_register_nothing(registry):
    put_stock_models()
    os.environ[IGNORING] = "1"
    plugin.register()
    assert registered(registry) == ARCHITECTURE


@pytest.mark.parametrize("named", [False, True])
def test_ignoring_is_vllm_as_it_is(registry, checkpoint, monkeypatch, named):
    """What vLLM starts with: its own model, processor, scheduler and worker, and its own identities
    of images.
    """
    from PIL import Image
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import ProcessorInputs

    monkeypatch.setenv(
        "VLLM_PLUGINS", "lora_filesystem_resolver,fsr" if named else "lora_filesystem_resolver"
    )

    def started(additional_config, **more):
        arguments = EngineArgs(
            model=str(checkpoint), max_model_len=2048, additional_config=additional_config, **more
        ).create_engine_config()
        processor = MULTIMODAL_REGISTRY.create_processor(arguments.model_config)
        items = processor.info.parse_mm_data({"image": Image.new("RGB", (32, 32))})
        inputs = ProcessorInputs([1], items, None, hf_processor_mm_kwargs={})
        hashes = inputs.get_mm_hashes(processor.info.model_id, "sha256")
        return arguments, type(processor), hashes

    theirs = {"fsr": {"ignore": True, "budget": "nonsense", "text_encoder": "nowhere/at-all"}}
    ignored, processor, hashes = started(theirs, mm_processor_kwargs={"fsr_budget": 32})
    assert registered(registry) == ARCHITECTURE and os.environ[IGNORING] == "1"
    assert processor.__module__.startswith("vllm.")
    assert ignored.parallel_config.worker_extension_cls == ""
    assert ignored.scheduler_config.get_scheduler_cls().__module__.startswith("vllm.")
    assert not hasattr(ignored.model_config.hf_config, SETTINGS_KEY)
    assert getattr(ignored.model_config.hf_config, IGNORED_KEY)
    assert not ignored.model_config.multimodal_config.mm_processor_kwargs
    with monkeypatch.context() as patch:  # an engine in the same process that does prune
        patch.setenv("VLLM_PLUGINS", "fsr")
        active, ours, _ = started({"fsr": {}})
        assert (
            registered(registry) == "FsrLlavaForConditionalGeneration"
            and IGNORING not in os.environ
        )
        assert "Fsr" in ours.__name__ and hasattr(active.model_config.hf_config, SETTINGS_KEY)
    assert hashes == started(theirs)[2]


def test_one_warning(registry, checkpoint, monkeypatch, caplog):
    from vllm.engine.arg_utils import EngineArgs

    for logger in (activation.logger, activation.logger.parent):
        monkeypatch.setattr(logger, "propagate", True)
    for _ in range(2):
        EngineArgs(
            model=str(checkpoint), additional_config={"fsr": {"ignore": True}}
        ).create_model_config()
    (said,) = {record.message for record in caplog.records if "left aside" in record.message}
    assert "dropped" in said


def test_the_start_says_in_words_what_is_in_force(registry, checkpoint, monkeypatch, caplog):
    from vllm.engine.arg_utils import EngineArgs

    for logger in (activation.logger, activation.logger.parent):
        monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", "vllm.fsr_vllm")
    settings = {"budget": 0.25, "min_budget": 16, "max_budget": 192, "detail_budgets": {"low": 64}}
    args = EngineArgs(
        model=str(checkpoint), max_model_len=2048, additional_config={"fsr": settings}
    )
    args.create_model_config()
    (said,) = {record.message for record in caplog.records if "is active" in record.message}
    for words in (
        "fsr_vllm: 0.1.0 is active for LlavaForConditionalGeneration",
        "by default 144 of 576 visual tokens per image",
        "requests may ask for 16 to 192",
        "by image detail low: 64 of 576",
        "method fsr",
        f"text encoder {checkpoint}/text_encoder",
    ):
        assert words in said
    assert "{" not in said


def test_the_commit_of_an_encoder_by_name_is_logged():
    settings = ServerSettings.parse({"text_encoder": "someone/clip@c0ffee", "adaptive": "64:288"})
    said = activation.in_force(ARCHITECTURE, settings.model_copy(update={"tokens_per_image": 576}))
    assert "text encoder someone/clip at commit c0ffee" in said
    assert (
        "by default 288 to 64 of 576 visual tokens per image, by load; requests may ask for 1 or more"
        in said
    )
