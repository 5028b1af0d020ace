"""Fails when a name of vLLM that `fsr_vllm/compat_inputs.py` wraps has moved; and what is judged
there.
"""

import inspect
from types import SimpleNamespace

import pytest

from fsr_vllm.engine.conversation import DERIVED_KEY, Derived
from fsr_vllm.engine.inputs import IGNORED_KEY, judged, refuse_extra_args
from fsr_vllm.params import SETTINGS_KEY, ServerSettings
from fsr_vllm.params.misplaced import is_ours


def parameters(function):
    return list(inspect.signature(inspect.unwrap(function)).parameters)


def test_where_all_inputs_pass():
    from vllm.entrypoints.llm import LLM
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.engine.input_processor import InputProcessor

    for name in ("process_for_engine", "process_for_engine_async"):
        assert parameters(BaseRenderer.__dict__[name])[:2] == ["self", "prompt"]
    assert inspect.iscoroutinefunction(inspect.unwrap(BaseRenderer.process_for_engine_async))
    assert parameters(InputProcessor.__dict__["process_inputs"])[:4] == [
        "self",
        "request_id",
        "prompt",
        "params",
    ]
    assert "self.model_config =" in inspect.getsource(InputProcessor.__init__)
    assert parameters(LLM._add_request)[:3] == ["self", "prompt", "params"]
    assert "self._add_request(" in inspect.getsource(LLM._render_and_add_requests)
    assert "self.model_config =" in inspect.getsource(LLM.__init__)
    extras = inspect.getsource(BaseRenderer._apply_prompt_extras)
    assert (
        "update(prompt_extras)" in extras
    )  # so that mm_processor_kwargs of a call are in each prompt by then


def config(settings=None, **more):
    found = dict(more)
    if settings is not None:
        found[SETTINGS_KEY] = ServerSettings.parse(settings).model_dump_json()
    return SimpleNamespace(hf_config=SimpleNamespace(**found))


def ask(model_config, given, has_media=False, reason=None):
    return judged(model_config, given, has_media, lambda model_config: reason)


def test_prompts_without_fields_are_left_alone():
    given = {"num_crops": 4}
    for model_config in (config(), config({}), config(**{IGNORED_KEY: True})):
        assert ask(model_config, given) is given
    assert ask(config(), {"num_crops": 4, "fsr_budget": None}) == given


@pytest.mark.parametrize("name", ["fsr_budget", "fsr-budget", "fsrBudget", "FSR_METHOD"])
def test_fields_are_refused_by_their_own_name(name):
    assert is_ours(name) and not is_ours("fsrv_id") and not is_ours("fsr")
    for model_config, reason, words in (
        (config(), None, "not active"),
        (config({}), "no tower", "no tower"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*{words}") as error:
            ask(model_config, {name: 64}, has_media=True, reason=reason)
        assert error.value.parameter == name


def test_an_active_plugin_judges_text_here_and_images_later():
    model_config = config({"max_budget": 64})
    given = {"fsr_budget": 65, "num_crops": 4}
    assert ask(model_config, given, has_media=True) is given
    with pytest.raises(ValueError, match="65, above this server's maximum 64"):
        ask(model_config, given)
    assert ask(model_config, {"fsr_budget": 64, "num_crops": 4}) == {"num_crops": 4}
    assert ask(model_config, {DERIVED_KEY: Derived(("What?",), (None,))}) == {}


def test_a_plugin_left_aside_drops_them():
    model_config = config(**{IGNORED_KEY: True})
    assert ask(model_config, {"fsr_budget": "many", "fsrMethod": 3, "num_crops": 4}, True) == {
        "num_crops": 4
    }
    refuse_extra_args(model_config, {"fsr_budget": 64})


def test_long_names_are_cut():
    with pytest.raises(ValueError, match="not active") as error:
        ask(config(), {"fsr_" + "x" * 10_000: 1})
    assert len(str(error.value)) < 400 and len(error.value.parameter) == 80


def test_extra_args():
    refuse_extra_args(config({}), {"theirs": 1, "fsr_budget": None})
    with pytest.raises(ValueError, match="belongs in mm_processor_kwargs"):
        refuse_extra_args(config({}), {"fsr_budget": 64})
