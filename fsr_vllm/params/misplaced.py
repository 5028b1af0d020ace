"""Fields of ours that a request misspells, or puts where nobody reads them, are found here.

A key is ours if, lower-cased and without - and _, it is fsr + budget, method, options or question.
One that is null counts as absent, as it does in its right place. Paths are the client's, such as
`messages[0].content[1].fsr_budget`.
"""

from __future__ import annotations

from collections.abc import Iterator

from .budget import FieldError
from .request import PREFIX, REQUEST_FIELDS

_SPELT = {name.replace("_", ""): name for name in REQUEST_FIELDS}
_TOP = "at the top level of the body (offline: in mm_processor_kwargs)"
_LIST = f"{_TOP}, as one value or a list with one per image"
_HOME = {name: _LIST if name in ("fsr_budget", "fsr_question") else _TOP for name in REQUEST_FIELDS}
_FIRST = frozenset("fF-_")
_LONGEST = 32  # characters of a key; a longer one is nobody's slip
# An Anthropic part that holds parts of its own, whose images are pruned like any other.
_NESTING = "tool_result"
_HOLDERS = (
    "image_url",
    "source",
)  # an image part's own object, in OpenAI's and in Anthropic's shape


def meant(key: object) -> str | None:
    """The field that a key spells, in whatever way; None for a key that is none of ours."""
    # Asked of every key of every part, so the cheapest question comes first.
    if not isinstance(key, str) or key[:1] not in _FIRST or len(key) > _LONGEST:
        return None
    return _SPELT.get(key.lower().replace("-", "").replace("_", ""))


def is_ours(key: object) -> bool:
    """Whether a key is a field of ours in some spelling, or stands in our name space."""
    return isinstance(key, str) and (key.startswith(PREFIX) or meant(key) is not None)


def misspelt(values: object, where: str = "") -> FieldError | None:
    """The first field of ours under another name than its own; `where` leads to the mapping."""
    for key, value in values.items() if isinstance(values, dict) else ():
        if value is not None and (name := meant(key)) not in (None, key):
            return FieldError(where + key, f"{where + key} is not read: the field is called {name}")
    return None


def out_of_place(values: object, where: str, why: str = "") -> FieldError | None:
    """The first field of ours in a mapping that carries none."""
    key = _first(values)
    if key is None:
        return None
    name = str(meant(key))
    return FieldError(where + key, f"{where + key} is not read: {name} belongs {_HOME[name]}{why}")


def in_messages(messages: object, images: int, where: str = "messages") -> FieldError | None:
    """The first field of ours in the messages and content parts of one or several conversations.

    After `images` images of a conversation nothing more of it is looked at: more than that the
    server refuses.
    """
    for place, entry in _entries(messages):
        path = f"{where}[{place}]"
        if isinstance(entry, (list, tuple)):  # a batch: one list per conversation
            found = _in_conversation(entry, images, path)
        else:
            found, images = _in_message(entry, images, path)
        if found is not None or images < 0:
            return found
    return None


def _in_conversation(messages: object, images: int, where: str) -> FieldError | None:
    for place, message in _entries(messages):
        found, images = _in_message(message, images, f"{where}[{place}]")
        if found is not None or images < 0:
            return found
    return None


def _in_message(message: object, images: int, where: str) -> tuple[FieldError | None, int]:
    """What is found in one message, and how many images are left after it."""
    if not isinstance(message, dict):
        return None, images
    found = out_of_place(message, f"{where}.")
    if found is not None:
        return found, images
    return _in_parts(message.get("content"), images, f"{where}.content")


def _in_parts(
    parts: object, images: int, where: str, nested: bool = False
) -> tuple[FieldError | None, int]:
    found = None
    for place, part in _entries(parts):
        if found is not None or images < 0:
            break
        if not isinstance(part, dict):
            continue
        kind = part.get("type")
        if kind == _NESTING and not nested and _first(part) is None:
            found, images = _in_parts(
                part.get("content"), images, f"{where}[{place}].content", nested=True
            )
            continue
        images -= "image" in kind if isinstance(kind, str) else "text" not in part
        for name in ("", *_HOLDERS):
            holder = part.get(name) if name else part
            if found is None and _first(holder) is not None:
                found = out_of_place(holder, f"{where}[{place}].{name}{'.' if name else ''}")
    return found, images


def _first(values: object) -> str | None:
    """The first key of ours in a mapping."""
    for key, value in values.items() if isinstance(values, dict) else ():
        if value is not None and meant(key) is not None:
            return str(key)
    return None


def _entries(values: object) -> Iterator[tuple[int, object]]:
    """The entries of a list, up to one that is no object: token ids and texts are many.

    Other iterables might be consumed by reading.
    """
    for place, value in enumerate(values if isinstance(values, (list, tuple)) else ()):
        if isinstance(value, (int, float, str)):
            return
        yield place, value
