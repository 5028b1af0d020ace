"""Fields of ours in a wrong place or spelling are refused with the place they belong to.

Looked at: the names at the top level and in the objects that people take for a place of extra
fields, content parts, and the names of request headers. What was parsed is read where it lies:
nothing is parsed twice or copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fsr_vllm.compat.types import HttpRequest
from fsr_vllm.params import REQUEST_FIELDS, FieldError, cut
from fsr_vllm.params.misplaced import in_messages, meant, misspelt, out_of_place
from fsr_vllm.server.fields import BUDGET_HEADER

CARRIERS = ("mm_processor_kwargs", "vllm_xargs")  # vLLM's own objects that may hold our fields
WRONG_PLACES = {
    "extra_body": "; extra_body is an argument of OpenAI's Python SDK, which puts what it holds "
    "there",
    "metadata": "",
    "chat_template_kwargs": "",
}
# Chat and Anthropic; Responses and embeddings; Cohere's embeddings.
CONVERSATIONS = ("messages", "input", "inputs")
PARTS = "content_parts"  # vLLM's own, of rendered requests


def has_conversation(request: HttpRequest) -> bool:
    """Whether a request, as `in_body` takes it, has a place for messages."""
    return any(_read(request, name) is not None for name in CONVERSATIONS)


def in_body(request: HttpRequest, images: int) -> FieldError | None:
    """The first of our fields that a request, or its body as JSON, misplaces or misspells.

    `images` is the number of images that the model takes in a prompt.
    """
    top = request if isinstance(request, Mapping) else getattr(request, "model_extra", None)
    found = misspelt(top)
    for name in CARRIERS:
        found = found or misspelt(_read(request, name), f"{name}.")
    for name, why in WRONG_PLACES.items():
        found = found or out_of_place(_read(request, name), f"{name}.", why)
    for name in (*CONVERSATIONS, PARTS):
        found = found or in_messages(_read(request, name), images, name)
    return found


def _read(request: HttpRequest, name: str) -> object:
    if isinstance(request, Mapping):
        return request.get(name)
    extra = getattr(request, "model_extra", None) or {}
    return extra[name] if name in extra else getattr(request, name, None)


def in_headers(names: Iterable[str]) -> FieldError | None:
    """The first header that looks like ours and is not read; names come in lower case."""
    for name in names:
        plain = name.replace("-", "").replace("_", "")
        if name != BUDGET_HEADER and (plain.startswith("xfsr") or meant(name)):
            name = cut(name)
            return FieldError(
                name,
                f"{name} is not read: the one header of ours is {BUDGET_HEADER}; "
                f"{', '.join(REQUEST_FIELDS)} belong at the top level of the JSON body",
            )
    return None
