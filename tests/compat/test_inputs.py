"""Where all inputs pass, and what is judged there."""

import asyncio
from types import SimpleNamespace

import pytest

from fsr_vllm.compat.attributes import IGNORED_KEY
from fsr_vllm.compat.errors import request_error
from fsr_vllm.compat.patching import reverted
from fsr_vllm.compat.prompts import wrap_offline_parameters, wrap_prompts
from fsr_vllm.compat.state import ACTIVE, INACTIVE, VARIABLE
from fsr_vllm.engine.inputs import judged, refuse_extra_args
from fsr_vllm.params import (
    SETTINGS_KEY,
    Derived,
    FsrRequest,
    RequestFields,
    ServerSettings,
    with_request,
)
from fsr_vllm.params.misplaced import is_ours


@pytest.fixture
def renderer():
    """vLLM's renderer with nothing but the parts around the hook replaced."""
    from vllm.renderers.base import BaseRenderer

    class Renderer(BaseRenderer):
        def __init__(self):
            self.model_config = SimpleNamespace(is_encoder_decoder=False)
            self.default_cmpl_tok_params = None

        def render_prompts(self, prompts):
            return prompts

        async def render_prompts_async(self, prompts):
            return prompts

        def tokenize_prompts(self, prompts, params):
            return prompts

        async def tokenize_prompts_async(self, prompts, params):
            return prompts

        def _process_singleton(self, prompt, **kwargs):
            return dict(prompt)

        async def _process_singleton_async(self, prompt, **kwargs):
            return dict(prompt)

    Renderer.__abstractmethods__ = frozenset()
    return Renderer()


def test_every_prompt_is_judged_with_the_options_of_its_call(renderer):
    def judge(model_config, given, has_media):
        assert model_config is renderer.model_config
        return {"judged": given, "media": has_media}

    def prompts():
        with_media = {"prompt_token_ids": [1], "multi_modal_data": {"image": 0}}
        own = {"prompt_token_ids": [1], "mm_processor_kwargs": {"own": 1}}
        return [with_media, own, {"prompt_token_ids": [1]}]

    options = {"prompt_extras": {"mm_processor_kwargs": {"k": 1}}}
    with reverted():
        wrap_prompts(judge)
        for inputs in (
            renderer.render_cmpl(prompts(), **options),
            asyncio.run(renderer.render_cmpl_async(prompts(), **options)),
        ):
            seen = [one["mm_processor_kwargs"] for one in inputs]
            assert seen[0] == {"judged": {"k": 1}, "media": True}
            assert not seen[1]["media"]
            assert seen[2] == {"judged": {"k": 1}, "media": False}
        for one in renderer.render_cmpl(prompts()[::2]):
            assert "mm_processor_kwargs" not in one


def test_both_prompts_of_an_encoder_decoder_are_judged(renderer):
    renderer._process_enc_dec = lambda prompt, **kwargs: dict(prompt)
    with reverted():
        wrap_prompts(lambda model_config, given, has_media: {"judged": given})
        parts = {
            "encoder_prompt": {"mm_processor_kwargs": {"a": 1}},
            "decoder_prompt": {"mm_processor_kwargs": {"b": 1}},
        }
        made = renderer.process_for_engine(parts, 0.0)
    assert made["encoder_prompt"]["mm_processor_kwargs"] == {"judged": {"a": 1}}
    assert made["decoder_prompt"]["mm_processor_kwargs"] == {"judged": {"b": 1}}


@pytest.fixture
def parameters(untouched, monkeypatch):
    """A function: whether sampling parameters with a field of ours get to vLLM, given to an engine
    or to an LLM, in a process of this state.
    """
    from vllm import LLM, SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    def judge(model_config, extra):
        assert extra == {"fsr_budget": 64}
        raise request_error("fsr_budget: no", "fsr_budget")

    monkeypatch.setattr(InputProcessor, "process_inputs", _process_inputs)
    holder = next(cls for cls in LLM.__mro__ if "_add_request" in vars(cls))
    monkeypatch.setattr(holder, "_add_request", lambda self, prompt, params: "taken")

    def run(kind, prompt, state, extra={"fsr_budget": 64}):  # noqa: B006
        monkeypatch.setenv(VARIABLE, state)
        one = object.__new__({"engine": InputProcessor, "LLM": LLM}[kind])
        one.model_config = config({} if state == ACTIVE else None)
        params = SamplingParams(extra_args=extra)
        with reverted():
            wrap_offline_parameters(judge)
            try:
                if kind == "LLM":
                    return one._add_request(prompt, params)
                return one.process_inputs("id", prompt, params)
            except ValueError:
                return "refused"

    return run


def _process_inputs(self, request_id, prompt, params, supported_tasks=()):
    return "taken"


RENDERED = {"type": "token", "prompt_token_ids": [1]}


@pytest.mark.parametrize(
    ("kind", "prompt", "state", "outcome"),
    [
        ("engine", "raw", ACTIVE, "refused"),
        ("engine", {"prompt": "raw"}, INACTIVE, "refused"),
        ("engine", RENDERED, INACTIVE, "refused"),
        ("engine", RENDERED, ACTIVE, "taken"),  # of a server, which read them
        ("LLM", RENDERED, ACTIVE, "refused"),
    ],
)
def test_sampling_parameters_are_judged_where_nobody_reads_them(
    parameters, kind, prompt, state, outcome
):
    assert parameters(kind, prompt, state) == outcome
    assert parameters(kind, prompt, state, extra=None) == "taken"


def config(settings=None, unsupported=None, **more):
    found = dict(more)
    if settings is not None:
        parsed = ServerSettings.parse(settings).model_copy(update={"unsupported": unsupported})
        found[SETTINGS_KEY] = parsed.model_dump_json()
    return SimpleNamespace(hf_config=SimpleNamespace(**found))


def ask(model_config, given, has_media=False):
    return judged(model_config, given, has_media)


def test_prompts_without_fields_are_left_alone():
    given = {"num_crops": 4}
    for model_config in (config(), config({}), config(**{IGNORED_KEY: True})):
        assert ask(model_config, given) is given
    assert ask(config(), {"num_crops": 4, "fsr_budget": None}) == given


@pytest.mark.parametrize("name", ["fsr_budget", "fsr-budget", "fsrBudget", "FSR_METHOD"])
def test_fields_are_refused_by_their_own_name(name):
    assert is_ours(name)
    assert not is_ours("fsrv_id")
    assert not is_ours("fsr")
    for model_config, words in ((config(), "not active"), (config({}, "no tower"), "no tower")):
        with pytest.raises(ValueError, match=f"{name}: .*{words}") as error:
            ask(model_config, {name: 64}, has_media=True)
        assert error.value.parameter == name


def test_an_active_plugin_judges_text_here_and_images_later():
    model_config = config({"max_budget": 64})
    given = {"fsr_budget": 65, "num_crops": 4}
    assert ask(model_config, given, has_media=True) is given
    with pytest.raises(ValueError, match="65, above this server's maximum 64"):
        ask(model_config, given)
    assert ask(model_config, {"fsr_budget": 64, "num_crops": 4}) == {"num_crops": 4}
    # What the plugin derived is not the client's, and is not judged as such.
    derived = FsrRequest(RequestFields(), Derived(("What?",), (None,)))
    assert ask(model_config, with_request({"num_crops": 4}, derived)) == {"num_crops": 4}


def test_a_plugin_left_aside_drops_them():
    model_config = config(**{IGNORED_KEY: True})
    assert ask(model_config, {"fsr_budget": "many", "fsrMethod": 3, "num_crops": 4}, True) == {
        "num_crops": 4
    }
    refuse_extra_args(model_config, {"fsr_budget": 64})


def test_long_names_are_cut():
    with pytest.raises(ValueError, match="not active") as error:
        ask(config(), {"fsr_" + "x" * 10_000: 1})
    assert len(str(error.value)) < 400
    assert len(error.value.parameter) == 80


def test_extra_args():
    refuse_extra_args(config({}), {"theirs": 1, "fsr_budget": None})
    with pytest.raises(ValueError, match="belongs in mm_processor_kwargs"):
        refuse_extra_args(config({}), {"fsr_budget": 64})
