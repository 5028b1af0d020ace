"""Where conversations are rendered, on every surface that has messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fsr_vllm.compat.patching import wrap_method


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
