"""What request outputs carry."""

from __future__ import annotations

from fsr_vllm.compat.identity import visual_tokens
from fsr_vllm.compat.patching import Patch
from fsr_vllm.compat.types import Anything, Function

_WHY = (
    "Request outputs carry nothing of the processed input but its token ids. RequestState is made "
    "of what goes to the engine, and makes the outputs of LLM, LLMEngine and AsyncLLM alike."
)
_UNTIL = "outputs carry what the processor left on its input"
_RUN = "0.27, 0.28, 0.30-0.32"
FROM_NEW_REQUEST = Patch(
    "vllm.v1.engine.output_processor:RequestState.from_new_request",
    _WHY,
    _UNTIL,
    signature="(cls, tokenizer, request)",
    run=_RUN,
)
NEW_REQUEST_OUTPUT = Patch(
    "vllm.v1.engine.output_processor:RequestState._new_request_output",
    _WHY,
    _UNTIL,
    signature="(self)",
    run=_RUN,
)


def wrap_outputs() -> None:
    """Put (kept, total) of a request on each of its outputs, as attribute `fsr_visual_tokens`."""

    def begin(stock: Function) -> Function:
        def from_new_request(cls: type, *args: Anything, **kwargs: Anything) -> Anything:
            state = stock(cls, *args, **kwargs)
            request = kwargs.get("request", args[1] if len(args) > 1 else None)
            if request is not None:
                state.fsr_visual_tokens = visual_tokens(request.mm_features)
            return state

        return from_new_request

    def output(stock: Function) -> Function:
        def _new_request_output(self: Anything, *args: Anything, **kwargs: Anything) -> Anything:
            made = stock(self, *args, **kwargs)
            if hasattr(self, "fsr_visual_tokens"):
                made.fsr_visual_tokens = self.fsr_visual_tokens
            return made

        return _new_request_output

    FROM_NEW_REQUEST.apply(begin)
    NEW_REQUEST_OUTPUT.apply(output)
