"""The HTTP surfaces: where a request is parsed and not yet rendered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace

from fsr_vllm.compat.errors import request_error_class
from fsr_vllm.compat.patching import Entry, Patch
from fsr_vllm.compat.types import Anything, EngineInputs, Function, HttpRequest, ModelConfig

_ONLINE = "vllm.renderers.online_renderer"
_POOLING = "vllm.entrypoints.pooling.base.serving"
_DECLARED = "a plugin can declare fields of requests"
PREPROCESS_CHAT = Patch(
    f"{_ONLINE}:OnlineRenderer.preprocess_chat",
    "All OpenAI-style requests are parsed objects here and not yet rendered; a middleware that "
    "rewrites bodies would read media twice.",
    _DECLARED,
    signature="async (self, request, messages)",
)
PREPROCESS_COMPLETION = Patch(
    f"{_ONLINE}:OnlineRenderer.preprocess_completion",
    "The same for requests without images, whose fields are judged too.",
    _DECLARED,
    signature="async (self, request)",
)
_TRUST = (
    "Since 0.31 mm_processor_kwargs of requests are refused unless --trust-request-mm-kwargs opens "
    "them all. Ours, which are validated by then, pass; all other keys are still judged by vLLM."
)
MM_KWARGS = tuple(
    Patch(
        f"{module}:validate_request_mm_kwargs",
        _TRUST,
        _DECLARED,
        signature="(*, mm_processor_kwargs)",
        missing="until 0.30",
    )
    for module in (_ONLINE, _POOLING)
)
_MODEL = (
    "The one step that all endpoints with a `model` take before they read anything else of a "
    "request: budgets behind model names are read here, and misplaced fields refused."
)
MODEL_CHECKS = tuple(
    Patch(
        f"{target}._check_model",
        _MODEL,
        "a plugin can resolve model names",
        signature="async (self, request)",
        missing="releases that check model names elsewhere",
    )
    for target in (
        "vllm.entrypoints.serve.engine.serving:BaseServing",
        f"{_POOLING}:PoolingBaseServing",
    )
)
POOLING_CONTEXT = Patch(
    f"{_POOLING}:PoolingBaseServing._init_ctx",
    "Pooling endpoints have a way of their own to the renderer, judge mm_processor_kwargs "
    "themselves, and some of their request models drop unknown fields.",
    _DECLARED,
    signature="async (self, io_processor, request, raw_request)",
    missing="releases without this class",
)
POOLING_RESULT = Patch(
    f"{_POOLING}:PoolingBaseServing._preprocessing",
    "Where the processed inputs of a pooling request are seen, for the answer's header.",
    _DECLARED,
    signature="either (self, io_processor, ctx)",  # not yet a coroutine in 0.26
    missing="releases without this class",
)
_FOREIGN = (
    "Its request model drops unknown fields. FastAPI has parsed the body and keeps the result on "
    "the request object, so that reading it costs no second parse."
)
FOREIGN_HANDLERS = tuple(
    Patch(
        f"vllm.entrypoints.{target}",
        _FOREIGN,
        "its request model passes unknown fields on",
        signature="async (self, request)",
        missing=missing,
    )
    for target, missing in (
        ("anthropic.serving:AnthropicServingMessages.create_messages", "releases without it"),
        ("anthropic.serving:AnthropicServingMessages.count_tokens", "releases without it"),
        ("cohere.serving:CohereServingChatV2.create_chat_v2", "without the package cohere"),
        ("scale_out.render.serving:ServingRender.render_messages_request", "releases without it"),
        ("scale_out.token_in_token_out.serving:ServingTokens.serve_tokens", "releases without it"),
    )
)
SERVED_NAMES = tuple(
    Entry(
        f"vllm.entrypoints.openai.models.serving:{name}",
        "`base_model_paths` and `lora_requests`: a name that is served as it stands keeps its "
        "own meaning, whatever suffix it ends in.",
        "a plugin can resolve model names",
    )
    for name in ("OpenAIModelRegistry", "OpenAIServingModels")
)

Before = Callable[[Anything, HttpRequest], None]
After = Callable[[EngineInputs], None]


def _let_fields_pass(patch: Patch) -> None:
    def make(stock: Function) -> Function:
        def validate(*, mm_processor_kwargs: Anything = None, **kwargs: Anything) -> None:
            others = {
                key: value
                for key, value in (mm_processor_kwargs or {}).items()
                if not key.startswith("fsr_")
            }
            stock(mm_processor_kwargs=others or None, **kwargs)

        return validate

    patch.apply(make)


def wrap_renderer(before: Before, after: After) -> None:
    """Call `before(renderer, request)` and `after(engine_inputs)` around every such request."""

    def chat(stock: Function) -> Function:
        async def preprocess_chat(
            self: Anything, request: HttpRequest, *args: Anything, **kwargs: Anything
        ) -> Anything:
            before(self, request)
            conversation, engine_inputs = await stock(self, request, *args, **kwargs)
            after(engine_inputs)
            return conversation, engine_inputs

        return preprocess_chat

    def completion(stock: Function) -> Function:
        async def preprocess_completion(
            self: Anything, request: HttpRequest, *args: Anything, **kwargs: Anything
        ) -> Anything:
            before(self, request)
            return await stock(self, request, *args, **kwargs)

        return preprocess_completion

    PREPROCESS_CHAT.apply(chat)
    PREPROCESS_COMPLETION.apply(completion)
    _let_fields_pass(MM_KWARGS[0])


def wrap_model_check(
    before: Callable[[ModelConfig, HttpRequest], Anything],
    after: Callable[[ModelConfig, HttpRequest, Anything], None],
) -> bool:
    """Call before(model_config, request) unless its `model` is served as it stands, vLLM's own
    check, then after(model_config, request, note). Returns whether this vLLM has the check.
    """

    def make(stock: Function) -> Function:
        async def _check_model(self: Anything, request: HttpRequest) -> Anything:
            served = {path.name for path in self.models.base_model_paths} | set(
                self.models.lora_requests
            )
            note = None if request.model in served else before(self.model_config, request)
            error = await stock(self, request)
            if error is None:
                after(self.model_config, request, note)
            return error

        return _check_model

    wrapped = [patch.apply(make) for patch in MODEL_CHECKS]
    return all(wrapped)


async def _body(request: HttpRequest, raw_request: HttpRequest) -> dict[str, Anything]:
    """What the client sent, also what the request's model drops."""
    body = await raw_request.json() if raw_request is not None else request.model_extra
    return body if isinstance(body, dict) else {}


def wrap_pooling(prepare: Before, report: After) -> None:
    """Read a pooling request's fields as a chat request's, and report what was kept."""

    def context(stock: Function) -> Function:
        async def _init_ctx(
            self: Anything,
            io_processor: Anything,
            request: HttpRequest,
            raw_request: HttpRequest = None,
        ) -> Anything:
            ctx = await stock(self, io_processor, request, raw_request)
            body = await _body(request, raw_request)
            given = ctx.prompt_extras.get("mm_processor_kwargs")
            dropped = body.get("mm_processor_kwargs")
            if given is None and isinstance(dropped, dict):
                # Ours alone: no check of vLLM has seen the others.
                ours = {key: value for key, value in dropped.items() if key.startswith("fsr_")}
                given = ours or None
            shown = SimpleNamespace(
                model_extra=body, mm_processor_kwargs=given, vllm_xargs=body.get("vllm_xargs")
            )
            prepare(SimpleNamespace(model_config=self.model_config, renderer=self.renderer), shown)
            if shown.mm_processor_kwargs is not None:
                ctx.prompt_extras["mm_processor_kwargs"] = shown.mm_processor_kwargs
            return ctx

        return _init_ctx

    def preprocessing(stock: Function) -> Function:
        def told(result: Anything, ctx: Anything) -> Anything:
            report([entry["prompts"] for entry in ctx.engine_inputs or ()])
            return result

        async def asynchronous(self: Anything, io_processor: Anything, ctx: Anything) -> Anything:
            return told(await stock(self, io_processor, ctx), ctx)

        def sync(self: Anything, io_processor: Anything, ctx: Anything) -> Anything:
            return told(stock(self, io_processor, ctx), ctx)

        return asynchronous if inspect.iscoroutinefunction(stock) else sync

    POOLING_CONTEXT.apply(context)
    POOLING_RESULT.apply(preprocessing)
    _let_fields_pass(MM_KWARGS[1])


def wrap_foreign_bodies(note: Callable[[ModelConfig, Anything], None]) -> None:
    """Call note(model_config, body) before these handlers, and answer our errors as theirs."""

    def make(stock: Function) -> Function:
        async def handler(
            self: Anything, request: HttpRequest, *args: Anything, **kwargs: Anything
        ) -> Anything:
            raw_request = kwargs.get("raw_request", args[0] if args else None)
            try:
                if raw_request is not None:
                    note(self.model_config, await raw_request.json())
                # Not all take a raw request before 0.32.
                return await stock(self, request, *args, **kwargs)
            except request_error_class() as error:
                # Raised, it would be logged as a failure of the server.
                return self.create_error_response(error)

        return handler

    for patch in FOREIGN_HANDLERS:
        patch.apply(make)


def wrap_refusals(judge: Callable[[ModelConfig, HttpRequest | Mapping[str, object]], None]) -> None:
    """Call judge(model_config, parsed request or body) once on each surface, before anything of a
    request but its model is read: all that an inactive plugin does here.
    """

    def checked(stock: Function) -> Function:
        async def _check_model(self: Anything, request: HttpRequest) -> Anything:
            error = await stock(self, request)
            if error is None:
                judge(self.model_config, request)
            return error

        return _check_model

    def pooling(stock: Function) -> Function:
        async def _init_ctx(
            self: Anything,
            io_processor: Anything,
            request: HttpRequest,
            raw_request: HttpRequest = None,
        ) -> Anything:
            # Before vLLM's check of mm_processor_kwargs, which knows nothing of ours.
            judge(self.model_config, await _body(request, raw_request))
            return await stock(self, io_processor, request, raw_request)

        return _init_ctx

    MODEL_CHECKS[0].apply(checked)
    POOLING_CONTEXT.apply(pooling)
    wrap_foreign_bodies(judge)
