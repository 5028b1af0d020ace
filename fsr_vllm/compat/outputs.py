"""What request outputs carry."""

from __future__ import annotations

from typing import Any

from fsr_vllm.compat.identity import visual_tokens
from fsr_vllm.compat.patching import wrap_method


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
                state.fsr_visual_tokens = visual_tokens(request.mm_features)
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
