"""What a start leaves behind: in the registry, in the configuration, in the log."""

import os
from types import SimpleNamespace

import pytest

import fsr_vllm
from fsr_vllm import activation, cli_args, plugin
from fsr_vllm.compat.attributes import IGNORED_KEY
from fsr_vllm.compat.config_files import wrap_config_files
from fsr_vllm.compat.platform import device_memory
from fsr_vllm.compat.registry import RESOLVED, put_models, put_stock_models
from fsr_vllm.compat.state import ACTIVE, IGNORING, INACTIVE, VARIABLE
from fsr_vllm.engine.families import FAMILIES, family_of
from fsr_vllm.params import SETTINGS_KEY, ServerSettings, read_settings, refusal

ARCHITECTURE = "LlavaForConditionalGeneration"


def test_what_vllm_remembers_of_models():
    from vllm import ModelRegistry
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    assert isinstance(ModelRegistry.models, dict)
    entry = _LazyRegisteredModel("their.module", "Their")
    assert (entry.module_name, entry.class_name) == ("their.module", "Their")
    assert RESOLVED.find() is not None


def test_models_come_and_go(registry):
    stock = "vllm.model_executor.models.llava"
    assert registered(registry) == "FsrLlavaForConditionalGeneration"
    RESOLVED.find()[0] = "an earlier engine's class"
    for _ in range(2):
        put_stock_models()
        assert registry.models[ARCHITECTURE].module_name == stock
        assert not RESOLVED.find()
    for _ in range(2):
        put_models(FAMILIES)
        assert registered(registry) == "FsrLlavaForConditionalGeneration"
    registry.register_model(ARCHITECTURE, f"{stock}:{ARCHITECTURE}")
    assert registered(registry) == ARCHITECTURE  # this is how registering replaces an entry


@pytest.mark.usefixtures("untouched")
def test_off_in_a_yaml_file(tmp_path):
    """vLLM leaves an option out that the parser of the file does not have."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    path = tmp_path / "options.yaml"
    path.write_text("enforce-eager: true\nfsr-max-budget: off\n")
    assert FlexibleArgumentParser().load_config_file(str(path)) == ["--enforce-eager"]
    wrap_config_files(cli_args.no_options)
    expected = ["--enforce-eager", "--no-fsr-max-budget"]
    assert FlexibleArgumentParser().load_config_file(str(path)) == expected


def test_device_memory():
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        assert device_memory() is None
    else:
        assert device_memory() == current_platform.get_device_total_memory()


@pytest.fixture
def registry(monkeypatch):
    """vLLM's registry with the plugin's classes, put back afterwards."""
    from vllm import ModelRegistry

    monkeypatch.setenv(VARIABLE, INACTIVE)
    plugin.register()
    yield ModelRegistry
    put_models(FAMILIES)


def registered(registry):
    return registry.models[ARCHITECTURE].class_name


def test_children_of_a_front_end_that_ignores_register_nothing(registry):
    put_stock_models()
    os.environ[VARIABLE] = IGNORING
    plugin.register()
    assert registered(registry) == ARCHITECTURE


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("inherited", [INACTIVE, ACTIVE, IGNORING])
def test_engine_cores_of_an_active_front_end_limit_encoder_work(monkeypatch, inherited):
    from vllm.config.scheduler import SchedulerConfig

    monkeypatch.setenv(VARIABLE, inherited)
    stock = SchedulerConfig.get_scheduler_cls
    plugin.register()
    assert (SchedulerConfig.get_scheduler_cls is stock) == (inherited != ACTIVE)


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
    assert registered(registry) == ARCHITECTURE
    assert os.environ[VARIABLE] == IGNORING
    assert processor.__module__.startswith("vllm.")
    assert ignored.parallel_config.worker_extension_cls == ""
    assert ignored.scheduler_config.get_scheduler_cls().__module__.startswith("vllm.")
    assert not hasattr(ignored.model_config.hf_config, SETTINGS_KEY)
    assert getattr(ignored.model_config.hf_config, IGNORED_KEY)
    assert not ignored.model_config.multimodal_config.mm_processor_kwargs
    with monkeypatch.context() as patch:  # an engine in the same process that does prune
        patch.setenv("VLLM_PLUGINS", "fsr")
        active, ours, _ = started({"fsr": {}})
        assert registered(registry) == "FsrLlavaForConditionalGeneration"
        assert os.environ[VARIABLE] == ACTIVE
        assert "Fsr" in ours.__name__
        settings = read_settings(active.model_config.hf_config)
        assert settings.unsupported is None
        assert set(settings.signals) == family_of([ARCHITECTURE]).signals
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
        f"fsr_vllm: {fsr_vllm.__version__} is active for LlavaForConditionalGeneration",
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
    assert "by default 288 to 64 of 576 visual tokens per image, by load" in said
    assert "requests may ask for 1 or more" in said


def test_where_sizes_vary_the_largest_image_is_what_is_logged():
    settings = ServerSettings.parse({"budget": 0.25, "detail_budgets": {"high": "off"}})
    found = settings.model_copy(update={"tokens_per_image": 2928, "one_size": False})
    said = activation.in_force(ARCHITECTURE, found)
    assert "by default up to 732 of 2928 visual tokens per image" in said
    assert "by image detail high: all up to 2928" in said


CONFLICT = "--video-pruning-rate: no"


def test_conflicts_with_vllms_options_are_refused_at_start(registry, checkpoint, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    family = family_of([ARCHITECTURE])
    monkeypatch.setattr(family, "conflicts", lambda args: CONFLICT * args.enforce_eager)
    given = {"model": str(checkpoint), "max_model_len": 2048, "additional_config": {"fsr": {}}}
    EngineArgs(**given).create_model_config()
    with pytest.raises(ValueError, match=CONFLICT):
        EngineArgs(**given, enforce_eager=True).create_model_config()
    EngineArgs(**{**given, "additional_config": {}}, enforce_eager=True).create_model_config()


def test_why_a_model_is_not_pruned_travels_in_the_settings(registry, checkpoint, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(family_of([ARCHITECTURE]), "unsupported", lambda config: "no tower")

    def made(**settings):
        given = {"max_model_len": 2048, "additional_config": {"fsr": settings}}
        return EngineArgs(model=str(checkpoint), **given).create_model_config()

    model_config = made(text_encoder="nowhere/at-all")
    assert read_settings(model_config.hf_config).unsupported == "no tower"
    assert refusal(model_config.hf_config) == "no tower"
    assert not activation.limits_encoder(SimpleNamespace(model_config=model_config))
    with pytest.raises(ValueError, match="a default budget is set, but no tower"):
        made(budget=64)
