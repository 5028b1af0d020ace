"""The other half of `compat`: names of vLLM's serving surfaces that are wrapped because it offers
no hook there.

The same rules hold: each entry says why it is needed and when it can go, and
`tests/compat/test_surfaces.py` fails when one of them moves. Read and run in 0.32; a name that
another version of the window lacks is passed over, and what depends on it is refused at start
(`hooked`) or behaves as vLLM does.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from fsr_vllm import compat, compat_identity
from fsr_vllm.compat_patching import wrap_method

RESULT_KEY = "fsr_visual_tokens"  # (kept, total) on a processed input
ADAPTIVE_KEY = (
    "fsr_adaptive"  # the budget that the load gave its images, where the request named none
)
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
GRPC_LAUNCHERS = ("vllm.entrypoints.launchers.grpc_server", "vllm.entrypoints.grpc_server")


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


def wrap_chat_rendering(settle: Callable[[Any, Any, Any], Any]) -> None:
    """Let settle(model_config, conversations, mm_processor_kwargs) say what each conversation's
    processor is given.

    Why: BaseRenderer.render_chat and render_chat_async are where every surface that has messages
    ends up, LLM.chat and pooling endpoints included, and the last place that still sees them. Can
    go when a renderer takes a plugin's hook.
    """
    from vllm.renderers.base import BaseRenderer

    def each(renderer: Any, conversations: Any, extras: Any) -> list[Any]:
        given = (extras or {}).get("mm_processor_kwargs")
        settled = settle(renderer.model_config, conversations, given)
        if all(values is given for values in settled):
            return []
        return [{**(extras or {}), "mm_processor_kwargs": values} for values in settled]

    def sync(stock: Any) -> Any:
        def render_chat(
            self: Any, conversations: Any, *args: Any, prompt_extras: Any = None, **kwargs: Any
        ) -> Any:
            extras = each(self, conversations, prompt_extras)
            if not extras:
                return stock(self, conversations, *args, prompt_extras=prompt_extras, **kwargs)
            pairs = zip(conversations, extras, strict=True)
            return _joined(
                [stock(self, [one], *args, prompt_extras=extra, **kwargs) for one, extra in pairs]
            )

        return render_chat

    def asynchronous(stock: Any) -> Any:
        async def render_chat_async(
            self: Any, conversations: Any, *args: Any, prompt_extras: Any = None, **kwargs: Any
        ) -> Any:
            extras = each(self, conversations, prompt_extras)
            if not extras:
                return await stock(
                    self, conversations, *args, prompt_extras=prompt_extras, **kwargs
                )
            pairs = zip(conversations, extras, strict=True)
            calls = [
                stock(self, [one], *args, prompt_extras=extra, **kwargs) for one, extra in pairs
            ]
            return _joined(await asyncio.gather(*calls))

        return render_chat_async

    wrap_method(BaseRenderer, "render_chat", sync)
    wrap_method(BaseRenderer, "render_chat_async", asynchronous)


def _joined(results: Any) -> Any:
    return [one for result in results for one in result[0]], [
        one for result in results for one in result[1]
    ]


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


def image_limit(model_config: Any) -> int:
    """How many images vLLM takes in one prompt; more are refused unread. Attribute and method in
    0.26-0.33.
    """
    multimodal = getattr(model_config, "multimodal_config", None)
    return 0 if multimodal is None else int(multimodal.get_limit_per_prompt("image"))


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
            except compat.request_error_class() as error:
                return self.create_error_response(
                    error
                )  # raised, it would be logged as a failure of the server

        return handler

    for module, name, method in FOREIGN_HANDLERS:
        wrap_method(owner(module, name), method, make)


def wrap_outputs() -> None:
    """Put (kept, total) of a request on each of its outputs, as attribute `fsr_visual_tokens`.

    Why: request outputs carry nothing of the processed input but its token ids. RequestState is
    made of what goes to the engine, and makes the outputs of LLM, LLMEngine and AsyncLLM alike,
    however the prompt came in. Run in 0.27, 0.28 and 0.30-0.32. Can go when outputs carry what the
    processor left on its input.
    """
    from vllm.v1.engine.output_processor import RequestState

    def begin(stock: Any) -> Any:
        def from_new_request(cls: Any, *args: Any, **kwargs: Any) -> Any:
            state = stock(cls, *args, **kwargs)
            request = kwargs.get("request", args[1] if len(args) > 1 else None)
            if request is not None:
                state.fsr_visual_tokens = compat_identity.visual_tokens(request.mm_features)
            return state

        return from_new_request

    def output(stock: Any) -> Any:
        def _new_request_output(self: Any, *args: Any, **kwargs: Any) -> Any:
            made = stock(self, *args, **kwargs)
            if hasattr(self, "fsr_visual_tokens"):
                made.fsr_visual_tokens = self.fsr_visual_tokens
            return made

        return _new_request_output

    wrap_method(RequestState, "from_new_request", begin)
    wrap_method(RequestState, "_new_request_output", output)


def grpc_launcher_runs() -> bool:
    """Whether this process is vLLM's stand-alone gRPC server, which has no HTTP side and reads no
    fields of ours.
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return getattr(spec, "name", None) in GRPC_LAUNCHERS
