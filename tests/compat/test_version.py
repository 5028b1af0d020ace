"""The window of vLLM releases, and stepping aside for a budget of vLLM's own."""

import argparse
from types import SimpleNamespace

import pytest
from pydantic import create_model

from fsr_vllm import activation, cli_args, params, plugin
from fsr_vllm.compat import registry
from fsr_vllm.compat import version as releases
from fsr_vllm.compat.patching import Moved, reverted
from fsr_vllm.compat.state import VARIABLE
from fsr_vllm.compat.version import (
    _NATIVE,
    ALLOW,
    native_field,
    outside_window,
    steps_aside,
    vllm_version,
    window,
)
from fsr_vllm.engine.conversation import settled
from fsr_vllm.server import requests


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(ALLOW, raising=False)
    monkeypatch.setenv("VLLM_PLUGINS", "lora")
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back


def engine_args(fsr=None):
    additional = {} if fsr is None else {"fsr": fsr}
    return SimpleNamespace(additional_config=additional, hf_overrides={}, worker_extension_cls="")


# --- the window -----------------------------------------------------------------------------------


def this_is(monkeypatch, version):
    monkeypatch.setattr(releases, "vllm_version", lambda: version)


def test_this_vllm_is_inside_and_has_no_budget_of_its_own():
    import vllm.version

    assert vllm_version() == vllm.version.__version__
    assert window()
    assert outside_window() is None
    assert native_field() is None


@pytest.mark.parametrize(
    "version", ["0.26.0", "0.30.1", "0.32.0+cpu", "0.33.0.post1", "0.33.1.dev7+gabc"]
)
def test_inside(monkeypatch, version):
    this_is(monkeypatch, version)
    monkeypatch.setattr(releases, "window", lambda: "<0.34,>=0.26")
    assert outside_window() is None


@pytest.mark.parametrize(
    "version", ["0.25.1", "0.34.0rc1", "0.34.0", "1.0", "0.1.dev1+gabc", "dev"]
)
def test_outside_the_message_names_versions_and_ways_out(monkeypatch, version):
    this_is(monkeypatch, version)
    monkeypatch.setattr(releases, "window", lambda: "<0.34,>=0.26")
    message = outside_window()
    assert message
    assert version in message
    assert "<0.34" in message
    assert "FSR_ALLOW_ANY_VLLM=1" in message
    monkeypatch.setenv(ALLOW, "1")
    assert outside_window() is None


def test_a_checkout_that_is_not_installed_states_no_window(monkeypatch):
    monkeypatch.setattr(releases, "DISTRIBUTION", "no-such-distribution")
    assert window.__wrapped__() is None


def test_outside_an_active_plugin_refuses_and_an_inactive_one_does_nothing(monkeypatch):
    this_is(monkeypatch, "0.99.0")
    with pytest.raises(ValueError, match="supports vllm .* this is 0.99.0"):
        activation.put_settings(engine_args(fsr={}))
    inactive = engine_args()
    monkeypatch.setattr(
        activation, "is_online", lambda args: pytest.fail("went on to hook requests")
    )
    activation.put_settings(inactive)
    assert inactive.hf_overrides == {}
    assert inactive.worker_extension_cls == ""


def test_outside_the_command_line_says_so(monkeypatch):
    this_is(monkeypatch, "0.99.0")
    monkeypatch.setenv("VLLM_PLUGINS", "fsr")
    assert "this is 0.99.0" in cli_args.conflict(argparse.Namespace())
    monkeypatch.setenv("VLLM_PLUGINS", "lora")
    assert cli_args.conflict(argparse.Namespace()) is None


def test_outside_nothing_is_registered(monkeypatch):
    import vllm

    registered = []
    monkeypatch.setattr(vllm.ModelRegistry, "models", {})
    monkeypatch.setattr(registry, "_stock_models", {})
    monkeypatch.setattr(
        vllm.ModelRegistry, "register_model", lambda *given: registered.append(given)
    )
    plugin.register()
    assert registered
    registered.clear()
    this_is(monkeypatch, "0.99.0")
    plugin.register()
    assert not registered


@pytest.mark.usefixtures("untouched")
def test_outside_hooks_that_are_gone_stop_only_those_who_asked():
    from vllm.engine.arg_utils import EngineArgs

    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(EngineArgs, "create_model_config")
        with pytest.raises(Moved, match="create_model_config"):
            plugin.register()  # inside the window it is a bug of ours
        this_is(patch, "0.99.0")
        plugin.register()
        patch.setenv("VLLM_PLUGINS", "fsr")
        with pytest.raises(RuntimeError, match="this is 0.99.0"):
            plugin.register()


# --- a budget of vLLM's own -----------------------------------------------------------------------


@pytest.fixture
def native(monkeypatch):
    """vLLM's own chat request, with one field more."""
    from vllm.entrypoints.openai.chat_completion import protocol

    def gains(name):
        field = {name: (int | None, None)}
        request = create_model("Request", __base__=protocol.ChatCompletionRequest, **field)
        monkeypatch.setattr(protocol, "ChatCompletionRequest", request)

    return gains


@pytest.mark.parametrize(
    "name",
    [
        "image_token_budget",
        "max_image_tokens",
        "visual_tokens_ratio",
        "mm_pruning_rate",
        "vision_budget",
    ],
)
def test_a_field_that_sets_image_tokens_is_recognised(native, name):
    native(name)
    assert native_field() == name


@pytest.mark.parametrize(
    "name", ["max_tokens_per_step", "mm_cache_ratio", "image_token_id", "thinking_token_budget"]
)
def test_another_field_is_not(native, name):
    native(name)
    assert native_field() is None
    assert steps_aside() is None


def test_no_request_of_this_vllm_has_such_a_field():
    """Here rather than at a user's start: a new field that only looks like one is noticed when the
    window moves.
    """
    import vllm.entrypoints.openai.completion.protocol as completion
    import vllm.entrypoints.openai.responses.protocol as responses
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    requests = (ChatCompletionRequest, completion.CompletionRequest, responses.ResponsesRequest)
    assert "mm_processor_kwargs" in ChatCompletionRequest.model_fields
    assert not [name for kind in requests for name in kind.model_fields if _NATIVE.fullmatch(name)]


@pytest.fixture
def stepped_aside(native, monkeypatch):
    """A model config, as a start beside a budget of vLLM's own makes it."""
    native("image_token_budget")
    args = engine_args(fsr={"min_budget": 8})
    with reverted():
        activation.put_settings(args)
        assert args.worker_extension_cls == ""
        assert list(args.hf_overrides) == [params.SETTINGS_KEY]
        made = SimpleNamespace(
            hf_config=SimpleNamespace(**args.hf_overrides), multimodal_config=None
        )
        activation.finish_settings(args, made)  # there is nothing to finish
        assert vars(made.hf_config) == args.hf_overrides
        yield made


def test_the_plugin_steps_aside(native, monkeypatch, caplog):
    native("image_token_budget")
    monkeypatch.setattr(plugin.logger, "propagate", True)
    monkeypatch.setattr(plugin.logger.parent, "propagate", True)
    with caplog.at_level("WARNING"), reverted():
        activation.put_settings(engine_args(fsr={}))
    assert "steps aside" in caplog.text
    assert "image_token_budget" in caplog.text


def test_but_not_where_a_default_budget_would_be_ignored(native):
    native("image_token_budget")
    with pytest.raises(ValueError, match="use image_token_budget.* default budget"):
        activation.put_settings(engine_args(fsr={"budget": 64}))


def test_requests_are_told_which_field_to_use(stepped_aside):
    assert "use image_token_budget" in params.refusal(stepped_aside.hf_config)
    assert not activation.limits_encoder(SimpleNamespace(model_config=stepped_aside))
    request = SimpleNamespace(model_extra={"fsr_budget": 64})
    with pytest.raises(ValueError, match="use image_token_budget") as error:
        requests.before(SimpleNamespace(model_config=stepped_aside), request)
    assert error.value.parameter == "fsr_budget"
    with pytest.raises(params.FieldError, match="use image_token_budget"):
        settled(stepped_aside, [[]], {"fsr_budget": 64})
    untouched = {"num_crops": 4}
    (left,) = settled(stepped_aside, [[]], untouched)
    assert left is untouched


def test_the_override_prunes_all_the_same(native, monkeypatch):
    native("image_token_budget")
    monkeypatch.setenv(ALLOW, "1")
    assert native_field() is None
    assert steps_aside() is None
