"""Where every prompt passes before it is processed, offline ones included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fsr_vllm.compat.patching import wrap_method

# A prompt of vLLM that has been tokenised; an encoder-decoder's consists of two.
_PARTS = ("encoder_prompt", "decoder_prompt")


def wrap_prompts(judge: Callable[[Any, Mapping[str, Any], bool], Mapping[str, Any]]) -> None:
    """Let judge(model_config, mm_processor_kwargs, has_media) say what each prompt is processed
    with; call it often.

    Why: BaseRenderer.process_for_engine and its async twin are where prompts of every kind end up
    before they are processed: LLM.generate and LLM.chat, AsyncLLM, raw prompts given to an engine,
    HTTP; of every architecture, with or without images. Prompts without mm_processor_kwargs are not
    touched. Read and run in 0.32; where a version lacks one of the two, prompts are judged by our
    own processors alone. Can go when a renderer takes a plugin's hook.
    """
    from vllm.renderers.base import BaseRenderer

    def judged(renderer: Any, prompt: Any) -> Any:
        parts = [prompt[name] for name in _PARTS if isinstance(prompt.get(name), dict)] or [prompt]
        for part in parts:
            given = part.get("mm_processor_kwargs")
            if given:
                part["mm_processor_kwargs"] = judge(
                    renderer.model_config, given, bool(part.get("multi_modal_data"))
                )
        return prompt

    def sync(stock: Any) -> Any:
        def process_for_engine(self: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            return stock(self, judged(self, prompt), *args, **kwargs)

        return process_for_engine

    def asynchronous(stock: Any) -> Any:
        async def process_for_engine_async(
            self: Any, prompt: Any, *args: Any, **kwargs: Any
        ) -> Any:
            return await stock(self, judged(self, prompt), *args, **kwargs)

        return process_for_engine_async

    wrap_method(BaseRenderer, "process_for_engine", sync)
    wrap_method(BaseRenderer, "process_for_engine_async", asynchronous)


def wrap_offline_parameters(judge: Callable[[Any, Mapping[str, Any]], None]) -> None:
    """Call judge(model_config, extra_args) for the sampling parameters of every offline request;
    call it often.

    Why: behind HTTP `vllm_xargs` becomes `SamplingParams.extra_args`, and our fields in it are read
    there; offline nobody reads them. `LLM._add_request` is what all of `LLM`'s calls end in; raw
    prompts that reach InputProcessor.process_inputs come from users of LLMEngine and AsyncLLM,
    since servers render theirs first. Read and run in 0.32; a name that a version lacks is passed
    over. Can go when vLLM refuses extra_args that nothing reads.
    """
    from vllm.entrypoints.llm import LLM
    from vllm.v1.engine.input_processor import InputProcessor

    def checked(model_config: Any, params: Any) -> None:
        extra = getattr(params, "extra_args", None)
        if isinstance(extra, Mapping) and extra:
            judge(model_config, extra)

    def of_llm(stock: Any) -> Any:
        def _add_request(self: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            checked(self.model_config, params)
            return stock(self, prompt, params, *args, **kwargs)

        return _add_request

    def of_engines(stock: Any) -> Any:
        def process_inputs(
            self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any
        ) -> Any:
            if not (isinstance(prompt, dict) and "type" in prompt):
                checked(self.model_config, params)
            return stock(self, request_id, prompt, params, *args, **kwargs)

        return process_inputs

    owner = next((cls for cls in LLM.__mro__ if "_add_request" in cls.__dict__), None)
    if owner is not None:
        wrap_method(owner, "_add_request", of_llm)
    wrap_method(InputProcessor, "process_inputs", of_engines)
