"""The HTTP surfaces: where a request is parsed and not yet rendered."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from fsr_vllm.compat.errors import request_error_class
from fsr_vllm.compat.patching import wrap_method

MODEL_CHECKS = (
    ("vllm.entrypoints.serve.engine.serving", "BaseServing"),
    ("vllm.entrypoints.pooling.base.serving", "PoolingBaseServing"),
)


# Handlers whose request models drop what they do not know, so that our fields never reach the
# renderer by themselves.
FOREIGN_HANDLERS = (
    ("vllm.entrypoints.anthropic.serving", "AnthropicServingMessages", "create_messages"),
    ("vllm.entrypoints.anthropic.serving", "AnthropicServingMessages", "count_tokens"),
    ("vllm.entrypoints.cohere.serving", "CohereServingChatV2", "create_chat_v2"),
    ("vllm.entrypoints.scale_out.render.serving", "ServingRender", "render_messages_request"),
    ("vllm.entrypoints.scale_out.token_in_token_out.serving", "ServingTokens", "serve_tokens"),
)


def owner(module: str, name: str) -> Any:
    """A class of vLLM, or None where this version has it not."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def let_fields_pass(module: Any) -> None:
    """Let fsr_* keys, which are validated already, pass the check of mm_processor_kwargs that
    `module` imported.
    """
    check = getattr(module, "validate_request_mm_kwargs", None)
    if check is None or hasattr(check, "__wrapped__"):
        return

    @functools.wraps(check)
    def validate(*, mm_processor_kwargs: Any = None, **kwargs: Any) -> None:
        others = {k: v for k, v in (mm_processor_kwargs or {}).items() if not k.startswith("fsr_")}
        check(mm_processor_kwargs=others or None, **kwargs)

    module.validate_request_mm_kwargs = validate


def wrap_renderer(before: Callable[[Any, Any], None], after: Callable[[Any], None]) -> None:
    """Call `before(renderer, request)` and `after(engine_inputs)` around every chat-style request.

    Why: OnlineRenderer.preprocess_chat is where all OpenAI-style requests are parsed objects and
    not yet rendered; a body-rewriting middleware would read media twice. Since 0.31 per-request
    mm_processor_kwargs are refused unless --trust-request-mm-kwargs opens them all; our validated
    fsr_* keys pass, every other key is still judged by vLLM. Same signature in 0.26-0.33. Can go
    when vLLM lets a plugin declare request fields.
    """
    from vllm.renderers import online_renderer

    cls = online_renderer.OnlineRenderer
    if getattr(cls, "_fsr_wrapped", False):
        return
    stock = cls.preprocess_chat

    @functools.wraps(stock)
    async def preprocess_chat(
        self: Any, request: Any, messages: Any, *args: Any, **kwargs: Any
    ) -> Any:
        before(self, request)
        conversation, engine_inputs = await stock(self, request, messages, *args, **kwargs)
        after(engine_inputs)
        return conversation, engine_inputs

    stock_completion = cls.preprocess_completion

    @functools.wraps(stock_completion)
    async def preprocess_completion(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        before(self, request)  # it has no images: fields are judged, and there is nothing to prune
        return await stock_completion(self, request, *args, **kwargs)

    cls.preprocess_chat = preprocess_chat
    cls.preprocess_completion = preprocess_completion
    let_fields_pass(online_renderer)
    cls._fsr_wrapped = True


def wrap_model_check(
    before: Callable[[Any, Any], Any], after: Callable[[Any, Any, Any], None]
) -> bool:
    """Call before(model_config, request), vLLM's own check of `request.model`, then
    after(model_config, request, note).

    Why: the one step that all endpoints with a `model` take before they read anything else of a
    request. Returns whether this vLLM has it. Can go when model names can be resolved by a plugin.
    """

    def make(stock: Any) -> Any:
        async def _check_model(self: Any, request: Any) -> Any:
            served = {path.name for path in self.models.base_model_paths} | set(
                self.models.lora_requests
            )
            note = None if request.model in served else before(self.model_config, request)
            error = await stock(self, request)
            if error is None:
                after(self.model_config, request, note)
            return error

        return _check_model

    wrapped = [
        wrap_method(owner(module, name), "_check_model", make) for module, name in MODEL_CHECKS
    ]
    return all(wrapped)  # judged when all are wrapped


def wrap_pooling(prepare: Callable[[Any, Any], None], report: Callable[[Any], None]) -> None:
    """Read a pooling request's fields as the renderer hook reads a chat request's, and report what
    was kept.

    Why: pooling endpoints have a way of their own to the renderer, and judge mm_processor_kwargs by
    a name of their own. Can go with `wrap_renderer`.
    """
    module = "vllm.entrypoints.pooling.base.serving"
    cls = owner(module, "PoolingBaseServing")
    if cls is None:
        return

    def context(stock: Any) -> Any:
        async def _init_ctx(
            self: Any, io_processor: Any, request: Any, raw_request: Any = None
        ) -> Any:
            ctx = await stock(self, io_processor, request, raw_request)
            # Some of these request models drop unknown fields; the body was parsed and kept by
            # FastAPI.
            body = (
                await raw_request.json() if raw_request is not None else (request.model_extra or {})
            )
            body = body if isinstance(body, dict) else {}
            given = ctx.prompt_extras.get("mm_processor_kwargs")
            dropped = body.get("mm_processor_kwargs")
            if given is None and isinstance(
                dropped, dict
            ):  # ours alone: no check of vLLM has seen the others
                given = {
                    key: value for key, value in dropped.items() if key.startswith("fsr_")
                } or None
            shown = SimpleNamespace(
                model_extra=body, mm_processor_kwargs=given, vllm_xargs=body.get("vllm_xargs")
            )
            prepare(SimpleNamespace(model_config=self.model_config, renderer=self.renderer), shown)
            if shown.mm_processor_kwargs is not None:
                ctx.prompt_extras["mm_processor_kwargs"] = shown.mm_processor_kwargs
            return ctx

        return _init_ctx

    def preprocessing(stock: Any) -> Any:
        async def _preprocessing(self: Any, io_processor: Any, ctx: Any) -> Any:
            result = await stock(self, io_processor, ctx)
            report([entry["prompts"] for entry in ctx.engine_inputs or ()])
            return result

        return _preprocessing

    wrap_method(cls, "_init_ctx", context)
    wrap_method(cls, "_preprocessing", preprocessing)
    let_fields_pass(sys.modules[module])


def wrap_foreign_bodies(note: Callable[[Any, Any], None]) -> None:
    """Call note(model_config, body) with the parsed JSON body before these handlers, and answer our
    errors as theirs.

    Why: Anthropic's and Cohere's request models drop unknown fields. FastAPI has parsed the body
    and kept the result on the request object, so reading it costs no second parse. Can go when
    those models pass unknown fields on.
    """

    def make(stock: Any) -> Any:
        async def handler(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            raw_request = kwargs.get("raw_request", args[0] if args else None)
            try:
                if raw_request is not None:
                    note(self.model_config, await raw_request.json())
                return await stock(
                    self, request, *args, **kwargs
                )  # not all take a raw request before 0.32
            except request_error_class() as error:
                return self.create_error_response(
                    error
                )  # raised, it would be logged as a failure of the server

        return handler

    for module, name, method in FOREIGN_HANDLERS:
        wrap_method(owner(module, name), method, make)
