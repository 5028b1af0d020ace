"""Where conversations are rendered, on every surface that has messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from fsr_vllm.compat.patching import Patch
from fsr_vllm.compat.types import (
    Anything,
    Conversations,
    EngineInputs,
    Function,
    ModelConfig,
    Renderer,
)

Extras = Mapping[str, object] | None  # vLLM's prompt_extras, or the mm_processor_kwargs in them

_WHY = (
    "Every surface that has messages ends up here, LLM.chat and pooling endpoints included, and "
    "nothing after it sees them: questions and details of images are read here."
)
_UNTIL = "a renderer takes a hook of a plugin"
RENDER_CHAT = Patch(
    "vllm.renderers.base:BaseRenderer.render_chat",
    _WHY,
    _UNTIL,
    signature="(self, conversations, *, prompt_extras)",
)
RENDER_CHAT_ASYNC = Patch(
    "vllm.renderers.base:BaseRenderer.render_chat_async",
    _WHY,
    _UNTIL,
    signature="async (self, conversations, *, prompt_extras)",
)


def wrap_chat_rendering(
    settle: Callable[[ModelConfig, Conversations, Extras], Sequence[Extras]],
) -> None:
    """Let settle(model_config, conversations, mm_processor_kwargs) give each its own kwargs."""

    def each(renderer: Renderer, conversations: Conversations, extras: Extras) -> list[Extras]:
        given: Anything = (extras or {}).get("mm_processor_kwargs")
        settled = settle(renderer.model_config, conversations, given)
        if all(values is given for values in settled):
            return []
        return [{**(extras or {}), "mm_processor_kwargs": values} for values in settled]

    def sync(stock: Function) -> Function:
        def render_chat(
            self: Renderer,
            conversations: Conversations,
            *args: Anything,
            prompt_extras: Extras = None,
            **kwargs: Anything,
        ) -> EngineInputs:
            extras = each(self, conversations, prompt_extras)
            if not extras:
                return stock(self, conversations, *args, prompt_extras=prompt_extras, **kwargs)
            pairs = zip(conversations, extras, strict=True)
            return _joined(
                [stock(self, [one], *args, prompt_extras=extra, **kwargs) for one, extra in pairs]
            )

        return render_chat

    def asynchronous(stock: Function) -> Function:
        async def render_chat_async(
            self: Renderer,
            conversations: Conversations,
            *args: Anything,
            prompt_extras: Extras = None,
            **kwargs: Anything,
        ) -> EngineInputs:
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

    RENDER_CHAT.apply(sync)
    RENDER_CHAT_ASYNC.apply(asynchronous)


def _joined(results: EngineInputs) -> EngineInputs:
    """What one call for all conversations would have returned: (conversations, inputs)."""
    return [one for result in results for one in result[0]], [
        one for result in results for one in result[1]
    ]
