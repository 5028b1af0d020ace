"""Fields of ours in a request's wrong place or spelling: refused with the place they belong to,
never ignored.

Looked at: the names at the top level and in the objects that people take for a place of extra
fields, content parts, and the names of request headers. What was parsed is read where it lies:
nothing is parsed twice or copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fsr_vllm.params import REQUEST_FIELDS, FieldError
from fsr_vllm.params.misplaced import in_messages, meant, misspelt, out_of_place

BUDGET_HEADER = "x-fsr-budget"
CARRIERS = ("mm_processor_kwargs", "vllm_xargs")  # vLLM's own objects that may hold our fields
WRONG_PLACES = {
    "extra_body": "; extra_body is an argument of OpenAI's Python SDK, which puts what it holds there",
    "metadata": "",
    "chat_template_kwargs": "",
}
CONVERSATIONS = (
    "messages",
    "input",
    "inputs",
)  # chat and Anthropic; Responses and embeddings; Cohere's embeddings
PARTS = "content_parts"  # vLLM's own, of rendered requests


def in_body(request: Any, images: int) -> FieldError | None:
    """The first of our fields that this request misplaces or misspells; `request` is a parsed model
    or a parsed body.

    `images` is the number of images that the model takes in a prompt.
    """
    parsed = isinstance(request, Mapping)
    top = request if parsed else getattr(request, "model_extra", None) or {}

    def get(name: str) -> Any:
        return top[name] if name in top else None if parsed else getattr(request, name, None)

    found = misspelt(top)
    for name in CARRIERS:
        found = found or misspelt(get(name), f"{name}.")
    for name, why in WRONG_PLACES.items():
        found = found or out_of_place(get(name), f"{name}.", why)
    for name in CONVERSATIONS:
        found = found or in_messages(get(name), images, name)
    return found or in_messages(get(PARTS), images, PARTS)


def in_headers(names: Iterable[str]) -> FieldError | None:
    """The first header (lower case, as ASGI has them) that looks like ours and is not the one that
    is read.
    """
    for name in names:
        plain = name.replace("-", "").replace("_", "")
        if name != BUDGET_HEADER and (plain.startswith("xfsr") or meant(name)):
            name = name[:80]
            return FieldError(
                name,
                f"{name} is not read: the one header of ours is {BUDGET_HEADER}; "
                f"{', '.join(REQUEST_FIELDS)} belong at the top level of the JSON body",
            )
    return None
