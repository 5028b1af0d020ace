"""Fails when a name of vLLM that `fsr_vllm/compat_surfaces.py` wraps has moved; and what the wraps
do on their own.
"""

import inspect
import pickle
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fsr_vllm.compat import errors, http
from fsr_vllm.compat.engine_args import GRPC_LAUNCHERS
from fsr_vllm.compat.errors import request_error
from fsr_vllm.compat.front_end import image_limit
from fsr_vllm.compat.http import FOREIGN_HANDLERS, MODEL_CHECKS, owner, wrap_model_check
from fsr_vllm.engine.extension import OURS, with_ours
from fsr_vllm.engine.extension import FsrWorkerExtension


def parameters(function):
    return list(inspect.signature(inspect.unwrap(function)).parameters)


def test_chat_rendering():
    from vllm.renderers.base import BaseRenderer

    for function in (BaseRenderer.render_chat, BaseRenderer.render_chat_async):
        assert parameters(function)[:2] == ["self", "conversations"]
        assert (
            inspect.signature(inspect.unwrap(function)).parameters["prompt_extras"].kind.name
            == "KEYWORD_ONLY"
        )
    assert inspect.iscoroutinefunction(inspect.unwrap(BaseRenderer.render_chat_async))
    assert "self.model_config =" in inspect.getsource(BaseRenderer.__init__)


@pytest.mark.parametrize(("module", "name"), MODEL_CHECKS)
def test_model_checks(module, name):
    check = owner(module, name).__dict__["_check_model"]
    assert parameters(check) == ["self", "request"] and inspect.iscoroutinefunction(
        inspect.unwrap(check)
    )


def test_models_have_names_and_adapters():
    from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry, OpenAIServingModels

    for kind in (OpenAIModelRegistry, OpenAIServingModels):
        source = inspect.getsource(kind.__init__)
        assert "lora_requests" in source and "base_model_paths" in source


@pytest.mark.parametrize(("module", "name", "method"), FOREIGN_HANDLERS)
def test_foreign_handlers(module, name, method):
    cls = owner(module, name)
    if (
        cls is None
    ):  # Cohere's chat endpoint needs a package of its own; vLLM leaves the route out without it
        source = Path(find_spec(module).origin).read_text()
        assert (
            f"class {name}(" in source
            and f"async def {method}(\n        self,\n        request:" in source
        )
        return
    handler = cls.__dict__[method]
    assert parameters(handler)[:3] == ["self", "request", "raw_request"]
    assert callable(cls.create_error_response)
    base = owner(*MODEL_CHECKS[0])
    assert issubclass(cls, base) and "self.model_config =" in inspect.getsource(base.__init__)


def test_the_limit_of_images():
    from vllm.config import ModelConfig, MultiModalConfig

    assert "multimodal_config" in ModelConfig.__dataclass_fields__
    for limits, images in (({}, 999), ({"image": 3}, 3)):
        config = SimpleNamespace(multimodal_config=MultiModalConfig(limit_per_prompt=limits))
        assert image_limit(config) == images
    assert image_limit(SimpleNamespace(multimodal_config=None)) == 0


def test_pooling():
    from vllm.entrypoints.pooling.base import serving

    cls = serving.PoolingBaseServing
    assert parameters(cls._init_ctx) == ["self", "io_processor", "request", "raw_request"]
    assert parameters(cls._preprocessing) == ["self", "io_processor", "ctx"]
    assert parameters(serving.validate_request_mm_kwargs)[0] == "mm_processor_kwargs"
    assert "prompt_extras=prompt_extras" in inspect.getsource(inspect.unwrap(cls._init_ctx))


def test_refused_request_classes():
    from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreRequest
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

    from fsr_vllm.server.requests import UNREAD

    for kind in (GenerateRequest, RerankRequest, *ScoreRequest.__args__):
        assert {parent.__name__ for parent in kind.__mro__} & set(UNREAD)


def test_request_outputs_are_made_by_their_state():
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import RequestState

    made = RequestState.__dict__["from_new_request"]
    assert isinstance(made, classmethod) and parameters(made.__func__)[:3] == [
        "cls",
        "tokenizer",
        "request",
    ]
    assert "_new_request_output" in RequestState.__dict__
    assert "mm_features" in EngineCoreRequest.__struct_fields__


def test_grpc_launchers_are_still_there():
    assert all(find_spec(name) for name in GRPC_LAUNCHERS)


def test_errors_can_be_pickled():
    error = pickle.loads(pickle.dumps(request_error("wrong", "fsr_budget")))
    assert (
        type(error) is errors.FsrRequestError
        and error.parameter == "fsr_budget"
        and "wrong" in str(error)
    )
    with pytest.raises(AttributeError):
        _ = errors.Nothing


# --- what the wraps do ----------------------------------------------------------------------------


def test_a_name_that_is_served_is_not_taken_apart(monkeypatch):
    import asyncio

    class Serving:
        model_config = None
        models = SimpleNamespace(
            base_model_paths=[SimpleNamespace(name="a@fsr64")], lora_requests={"l@fsr1": None}
        )

        async def _check_model(self, request):
            return None if request.model in ("a@fsr64", "l@fsr1", "base") else "404"

    monkeypatch.setattr(http, "MODEL_CHECKS", (("m", "n"),))
    monkeypatch.setattr(http, "owner", lambda module, name: Serving)
    seen = []

    def split(model_config, request):
        request.model, suffix = request.model.split("@fsr")
        return suffix

    assert wrap_model_check(split, lambda config, request, note: seen.append((request.model, note)))
    for name in ("a@fsr64", "l@fsr1", "base@fsr2", "other@fsr3"):
        asyncio.run(Serving()._check_model(SimpleNamespace(model=name)))
    assert seen == [
        ("a@fsr64", None),
        ("l@fsr1", None),
        ("base", "2"),
    ]  # an unknown model is vLLM's own error
    monkeypatch.setattr(http, "owner", lambda module, name: None)
    assert not wrap_model_check(split, None)


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
    assert issubclass(combined, FsrWorkerExtension) and issubclass(combined, theirs.Extension)
    assert resolve_obj_by_qualname(name) is combined
    assert resolve_obj_by_qualname(with_ours("their_package.Inherits")) is theirs.Inherits
    with pytest.raises(ValueError, match="worker-extension-cls"):
        resolve_obj_by_qualname(with_ours("Nowhere"))
    with pytest.raises(ModuleNotFoundError):
        resolve_obj_by_qualname(with_ours("no_such_package.Extension"))
