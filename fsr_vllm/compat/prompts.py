"""Where every prompt passes before it is processed, offline ones included."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fsr_vllm.compat.attributes import SETTINGS_KEY
from fsr_vllm.compat.patching import Patch
from fsr_vllm.compat.state import ACTIVE, state
from fsr_vllm.compat.types import Anything, Function, ModelConfig, Renderer

# A prompt of vLLM that has been tokenised; an encoder-decoder's consists of two.
_PARTS = ("encoder_prompt", "decoder_prompt")

_WHY = (
    "Prompts of every kind end up here before they are processed: LLM.generate and LLM.chat, "
    "AsyncLLM, raw prompts given to an engine, HTTP; of every architecture, with or without "
    "images. Prompts without mm_processor_kwargs are not touched."
)
_UNTIL = "a renderer takes a hook of a plugin"
PROCESS = Patch(
    "vllm.renderers.base:BaseRenderer.process_for_engine",
    _WHY,
    _UNTIL,
    signature="(self, prompt)",
    missing="some older releases: prompts are then judged by our own processors alone",
)
PROCESS_ASYNC = Patch(
    "vllm.renderers.base:BaseRenderer.process_for_engine_async",
    _WHY,
    _UNTIL,
    signature="async (self, prompt)",
    missing="as above",
)
_EXTRA = (
    "Behind HTTP `vllm_xargs` becomes `SamplingParams.extra_args`, and our fields in it are read "
    "there; offline nobody reads them. "
)
_READ = "vLLM refuses extra_args that nothing reads"
PROCESS_INPUTS = Patch(
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    _EXTRA + "Where the plugin is active, raw prompts alone are judged: they come from users of "
    "LLMEngine and AsyncLLM, while servers render theirs first.",
    _READ,
    signature="(self, request_id, prompt, params)",
    missing="some older releases",
)
ADD_REQUEST = Patch(
    "vllm.entrypoints.llm:LLM._add_request",
    _EXTRA + "All calls of `LLM` end in this one. In 0.32 a base class of LLM holds it.",
    _READ,
    signature="(self, prompt, params)",
    missing="some older releases",
)


def wrap_prompts(judge: Callable[[ModelConfig, Mapping[str, Anything], bool], Anything]) -> None:
    """Let judge(model_config, mm_processor_kwargs, has_media) say what a prompt is given."""

    def judged(renderer: Renderer, prompt: Anything) -> Anything:
        parts = [prompt[name] for name in _PARTS if isinstance(prompt.get(name), dict)] or [prompt]
        for part in parts:
            given = part.get("mm_processor_kwargs")
            if given:
                part["mm_processor_kwargs"] = judge(
                    renderer.model_config, given, bool(part.get("multi_modal_data"))
                )
        return prompt

    def sync(stock: Function) -> Function:
        def process_for_engine(
            self: Renderer, prompt: Anything, *args: Anything, **kwargs: Anything
        ) -> Anything:
            return stock(self, judged(self, prompt), *args, **kwargs)

        return process_for_engine

    def asynchronous(stock: Function) -> Function:
        async def process_for_engine_async(
            self: Renderer, prompt: Anything, *args: Anything, **kwargs: Anything
        ) -> Anything:
            return await stock(self, judged(self, prompt), *args, **kwargs)

        return process_for_engine_async

    PROCESS.apply(sync)
    PROCESS_ASYNC.apply(asynchronous)


def wrap_offline_parameters(judge: Callable[[ModelConfig, Mapping[str, Anything]], None]) -> None:
    """Call judge(model_config, extra_args) for the sampling parameters of every offline request."""

    def checked(model_config: ModelConfig, params: Anything) -> None:
        extra = getattr(params, "extra_args", None)
        if isinstance(extra, Mapping) and extra:
            judge(model_config, extra)

    def of_llm(stock: Function) -> Function:
        def _add_request(
            self: Anything, prompt: Anything, params: Anything, *args: Anything, **kwargs: Anything
        ) -> Anything:
            checked(self.model_config, params)
            return stock(self, prompt, params, *args, **kwargs)

        return _add_request

    def of_engines(stock: Function) -> Function:
        def process_inputs(
            self: Anything,
            request_id: Anything,
            prompt: Anything,
            params: Anything,
            *args: Anything,
            **kwargs: Anything,
        ) -> Anything:
            rendered = isinstance(prompt, dict) and "type" in prompt
            inactive = not hasattr(self.model_config.hf_config, SETTINGS_KEY)
            if inactive or not rendered:
                checked(self.model_config, params)
            return stock(self, request_id, prompt, params, *args, **kwargs)

        return process_inputs

    PROCESS_INPUTS.apply(of_engines)
    if state() == ACTIVE:
        llm = ADD_REQUEST.owner()
        holder = next((cls for cls in llm.__mro__ if ADD_REQUEST.name in vars(cls)), llm)
        ADD_REQUEST.apply(of_llm, owner=holder)
