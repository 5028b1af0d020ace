"""Which text is the question of which image: read off the messages of an OpenAI-style chat request.

The question of an image is the user's text from the image's own message up to the next assistant message. So it is
settled when the image is first answered: a longer conversation asks for the very same tokens again, and the KV prefix
stays valid.

Messages are dicts as the chat API has them. Content is read, never consumed: a one-shot iterator (validated requests
can hold them) must be replaced by a list first, which is what `materialise` does.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_IMAGE_TYPES = frozenset({"image_url", "input_image", "image_pil", "image_embeds", "image"})
_TEXT_TYPES = frozenset({"text", "input_text", "output_text"})
# vLLM takes a part without a type (or one that carries a uuid) by the key that is there.
_IMAGE_KEYS = ("image_url", "image_pil", "image_embeds", "image")


def image_questions(messages: Iterable[Any]) -> list[str]:
    """One question per image of the conversation, in prompt order; "" where the user wrote none.

    Text parts, and user messages in a row, are joined by newlines and stripped. An image in a system or tool message
    takes the user's text that follows it; that message's own text is not a question. Unknown parts are passed over.

    Errors: TypeError for content that reading would consume; call `materialise` first.
    """
    questions: list[list[str]] = []
    answered = 0  # the images before this place have met an assistant message: their question is settled
    for message in _mappings(messages):
        role = message.get("role")
        if role == "assistant":
            answered = len(questions)
        parts = _parts(message)
        questions.extend([] for part in parts if _is_image(part))
        if role == "user" and (text := _text(parts)):
            for question in questions[answered:]:
                question.append(text)
    return ["\n".join(question) for question in questions]


def image_details(messages: Iterable[Any]) -> list[str | None]:
    """The `image_url.detail` of every image of the conversation, in prompt order; None where it is not given.

    Read inside `image_url`, or beside it, where the Responses API has it.

    Errors: TypeError for content that reading would consume; call `materialise` first.
    """
    return [_detail(part) for message in _mappings(messages) for part in _parts(message) if _is_image(part)]


def materialise(messages: Iterable[Any]) -> None:
    """Replace every message content that is neither text nor a list by a list, in place: it can then be read twice."""
    for message in _mappings(messages):
        content = message.get("content")
        if isinstance(content, Iterable) and not isinstance(content, (str, bytes, list, Mapping)):
            message["content"] = list(content)  # type: ignore[index]  # a chat message is a dict


def _mappings(messages: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    return (message for message in messages if isinstance(message, Mapping))


def _parts(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    if content is None or isinstance(content, (bytes, Mapping)):
        return ()
    if isinstance(content, str):
        return (content,)
    if isinstance(content, Sequence):
        return content
    if isinstance(content, Iterable):
        raise TypeError(f"message content is a one-shot {type(content).__name__}: call materialise() before reading it")
    return ()


def _is_image(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    kind = part.get("type")
    if isinstance(kind, str) and kind in _IMAGE_TYPES:
        return True
    return (kind is None or part.get("uuid") is not None) and any(key in part for key in _IMAGE_KEYS)


def _text(parts: Sequence[Any]) -> str:
    texts = []
    for part in parts:
        if isinstance(part, Mapping) and not _is_image(part):
            kind = part.get("type", "text")
            part = part.get("text") if isinstance(kind, str) and kind in _TEXT_TYPES else None
        if isinstance(part, str):
            texts.append(part.strip())
    return "\n".join(filter(None, texts))


def _detail(part: Mapping[str, Any]) -> str | None:
    image_url = part.get("image_url")
    detail = image_url.get("detail") if isinstance(image_url, Mapping) else None
    if detail is None:
        detail = part.get("detail")
    return detail if isinstance(detail, str) else None
