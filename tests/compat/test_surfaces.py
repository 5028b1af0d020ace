"""What the hooks do on vLLM's own surfaces, called without a server."""

import asyncio
import sys
from types import ModuleType, SimpleNamespace

import pytest

from fsr_vllm.compat import http
from fsr_vllm.compat.chat import wrap_chat_rendering
from fsr_vllm.compat.errors import request_error
from fsr_vllm.compat.patching import Patch, reverted
from fsr_vllm.engine.extension import OURS, FsrWorkerExtension, with_ours

pytestmark = pytest.mark.usefixtures("untouched")


def serving(module_of, *names):
    """One of vLLM's serving objects, with these models and an adapter, made without an engine."""
    from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry, OpenAIServingModels

    models = object.__new__(OpenAIServingModels)
    models.registry = object.__new__(OpenAIModelRegistry)
    paths = [SimpleNamespace(name=name) for name in names]
    models.registry.base_model_paths = models.base_model_paths = paths
    models.lora_requests = {"l@fsr1": None}
    made = object.__new__(module_of)
    made.models, made.model_config, made.request_logger = models, "config", None
    return made


@pytest.fixture
def base():
    from vllm.entrypoints.serve.engine.serving import BaseServing

    return serving(BaseServing, "a@fsr64", "base")


def test_a_name_that_is_served_is_not_taken_apart(base):
    seen = []

    def split(model_config, request):
        request.model, suffix = request.model.split("@fsr")
        return suffix

    assert http.wrap_model_check(
        split, lambda config, request, note: seen.append((config, request.model, note))
    )
    answers = [
        asyncio.run(base._check_model(SimpleNamespace(model=name)))
        for name in ("a@fsr64", "l@fsr1", "base@fsr2", "other@fsr3")
    ]
    assert seen == [
        ("config", "a@fsr64", None),
        ("config", "l@fsr1", None),
        ("config", "base", "2"),
    ]
    assert answers[:3] == [None] * 3
    assert answers[3].error.param == "model"  # an unknown model is vLLM's own error


def test_releases_that_check_names_elsewhere(monkeypatch):
    missing = Patch("no_such_module:Serving._check_model", "why", "until", missing="there")
    monkeypatch.setattr(http, "MODEL_CHECKS", (*http.MODEL_CHECKS, missing))
    assert not http.wrap_model_check(lambda *args: None, lambda *args: None)


def test_refusals_look_once_at_a_request_for_a_model_that_is_served(base):
    def judge(model_config, request):
        if "fsr_budget" in request.model_extra:
            raise request_error("fsr_budget: no", "fsr_budget")

    http.wrap_refusals(judge)
    assert asyncio.run(base._check_model(SimpleNamespace(model="base", model_extra={}))) is None
    ours = {"fsr_budget": 1}
    with pytest.raises(ValueError, match="no"):
        asyncio.run(base._check_model(SimpleNamespace(model="base", model_extra=ours)))
    answer = asyncio.run(base._check_model(SimpleNamespace(model="?", model_extra=ours)))
    assert answer.error.param == "model"  # vLLM's own error, as on an active server


def test_bodies_that_request_models_drop_are_read_before_the_handler():
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    async def body():
        return {"fsr_budget": 64}

    def note(model_config, given):
        assert (model_config, given) == ("config", {"fsr_budget": 64})
        raise request_error("fsr_budget: no", "fsr_budget")

    http.wrap_foreign_bodies(note)
    handler = serving(AnthropicServingMessages, "base")
    for name in ("create_messages", "count_tokens"):
        answer = asyncio.run(getattr(handler, name)(None, SimpleNamespace(json=body)))
        assert answer.error.param == "fsr_budget"
        assert answer.error.code == 400


def test_our_keys_pass_vllms_check_of_processor_options_and_others_do_not():
    from vllm.entrypoints.pooling.base import serving as pooling
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers import online_renderer

    http.wrap_renderer(lambda *args: None, lambda *args: None)
    http.wrap_pooling(lambda *args: None, lambda *args: None)
    for module in (online_renderer, pooling):
        check = {"media_io_kwargs": None, "trust_request_mm_kwargs": False}
        module.validate_request_mm_kwargs(mm_processor_kwargs={"fsr_budget": 64}, **check)
        with pytest.raises(VLLMValidationError, match="mm_processor_kwargs"):
            module.validate_request_mm_kwargs(
                mm_processor_kwargs={"fsr_budget": 64, "num_crops": 4}, **check
            )


def test_requests_are_seen_before_they_are_rendered(monkeypatch):
    from vllm.renderers.online_renderer import OnlineRenderer

    order = []

    async def preprocess_chat(self, request, messages, **kwargs):
        order.append(("rendered", request, messages))
        return "conversation", ["input"]

    async def preprocess_completion(self, request, **kwargs):
        order.append(("rendered", request))
        return ["input"]

    monkeypatch.setattr(OnlineRenderer, "preprocess_chat", preprocess_chat)
    monkeypatch.setattr(OnlineRenderer, "preprocess_completion", preprocess_completion)
    with reverted():
        http.wrap_renderer(
            lambda renderer, request: order.append(("before", request)),
            lambda inputs: order.append(("after", inputs)),
        )
        renderer = object.__new__(OnlineRenderer)
        assert asyncio.run(renderer.preprocess_chat("r", "m")) == ("conversation", ["input"])
        assert asyncio.run(renderer.preprocess_completion("c")) == ["input"]
    assert order == [
        ("before", "r"), ("rendered", "r", "m"), ("after", ["input"]),
        ("before", "c"), ("rendered", "c"),
    ]  # fmt: skip


@pytest.fixture
def renderer():
    """vLLM's chat rendering with nothing but the parts around it replaced."""
    from vllm.renderers.base import BaseRenderer

    class Renderer(BaseRenderer):
        def __init__(self):
            self.model_config = SimpleNamespace(is_encoder_decoder=False)
            self.default_chat_tok_params = None

        def render_messages(self, messages, params):
            return messages, {"prompt": messages}

        async def render_messages_async(self, messages, params):
            return self.render_messages(messages, params)

        def tokenize_prompts(self, prompts, params):
            return prompts

        async def tokenize_prompts_async(self, prompts, params):
            return prompts

        def process_for_engine(self, prompt, *args, **kwargs):
            return prompt

        async def process_for_engine_async(self, prompt, *args, **kwargs):
            return prompt

    Renderer.__abstractmethods__ = frozenset()
    return Renderer()


def test_each_conversation_is_rendered_with_what_it_says(renderer):
    params = SimpleNamespace(media_io_kwargs=None)

    def settle(model_config, conversations, given):
        assert model_config is renderer.model_config
        return [
            given if "plain" in text else {**(given or {}), "said": text} for text in conversations
        ]

    wrap_chat_rendering(settle)
    for given, expected in (
        (["plain"], [{"k": 1}]),
        (["a", "plain"], [{"k": 1, "said": "a"}, {"k": 1}]),
    ):
        extras = {"mm_processor_kwargs": {"k": 1}}
        for talk, inputs in (
            renderer.render_chat(given, params, prompt_extras=extras),
            asyncio.run(renderer.render_chat_async(given, params, prompt_extras=extras)),
        ):
            assert talk == given
            assert [one["mm_processor_kwargs"] for one in inputs] == expected
        assert extras == {"mm_processor_kwargs": {"k": 1}}


def test_refused_request_classes():
    from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreRequest
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

    from fsr_vllm.server.requests import UNREAD

    for kind in (GenerateRequest, RerankRequest, *ScoreRequest.__args__):
        assert {parent.__name__ for parent in kind.__mro__} & set(UNREAD)


@pytest.fixture
def theirs(monkeypatch):
    module = ModuleType("their_package")

    class Extension:
        def their_call(self):
            return 1

    class Inherits(FsrWorkerExtension):
        pass

    module.Extension, module.Inherits = Extension, Inherits
    monkeypatch.setitem(sys.modules, "their_package", module)
    return module


def test_worker_extensions_are_combined(theirs):
    from vllm.utils.import_utils import resolve_obj_by_qualname

    assert with_ours("") == with_ours(OURS) == OURS
    name = with_ours("their_package.Extension")
    assert with_ours(name) == name  # a start passes here more than once
    combined = resolve_obj_by_qualname(name)
    assert issubclass(combined, FsrWorkerExtension)
    assert issubclass(combined, theirs.Extension)
    assert resolve_obj_by_qualname(name) is combined
    assert resolve_obj_by_qualname(with_ours("their_package.Inherits")) is theirs.Inherits
    with pytest.raises(ValueError, match="worker-extension-cls"):
        resolve_obj_by_qualname(with_ours("Nowhere"))
    with pytest.raises(ModuleNotFoundError):
        resolve_obj_by_qualname(with_ours("no_such_package.Extension"))
