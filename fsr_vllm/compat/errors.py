"""Client errors in vLLM's own shape."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from fsr_vllm.compat.patching import Entry
from fsr_vllm.compat.types import Anything

VALIDATION_ERROR = Entry(
    "vllm.exceptions:VLLMValidationError",
    "What becomes HTTP 400 with `param`; until 0.30 it was a ValueError, which offline callers "
    "catch, so ours is both.",
    "it is a ValueError again",
)


@functools.cache
def request_error_class() -> type[Exception]:
    """The class of `request_error`, made when first needed, since importing vllm is slow."""
    from vllm.exceptions import VLLMValidationError

    return type("FsrRequestError", (VLLMValidationError, ValueError), {"__module__": __name__})


def __getattr__(name: str) -> type[Exception]:
    if name == "FsrRequestError":  # how pickle finds it, in whatever process an error arrives
        return request_error_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def request_error(message: str, field: str) -> Exception:
    """HTTP 400 in vLLM's OpenAI shape with `param`, a ValueError offline; a long name is cut."""
    message, field = message.replace(field, field[:80]), field[:80]
    return request_error_class()(message, parameter=field)  # type: ignore[call-arg]


@contextlib.contextmanager
def as_request_errors(kind: Anything) -> Iterator[None]:
    """Turn an error of this class, which says which `field` is wrong, into a client error."""
    try:
        yield
    except kind as error:
        raise request_error(str(error), error.field) from None
