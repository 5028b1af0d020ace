"""Which text is the question of which image: read off the messages of an OpenAI-style chat request.

The question of an image is the user's text from the image's own message up to the next assistant
message, or, where there is none, the last text of the user before it (the image of a tool's result,
or one sent after its question). So it is settled when the image is first answered: a longer
conversation asks for the very same tokens again, and the KV prefix stays valid.

Messages are dicts as the chat API has them. Content is read, never consumed: a one-shot iterator
(validated requests can hold them) must be replaced by a list first, which is what `materialise`
does. All work is bounded by the size of the messages, whatever the number of images: texts are read
from their end, and images with one question share one string.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

_IMAGE_TYPES = frozenset({"image_url", "input_image", "image_pil", "image_embeds", "image"})
_TEXT_TYPES = frozenset({"text", "input_text", "output_text"})
# vLLM takes a part without a type (or one that carries a uuid) by the key that is there.
_IMAGE_KEYS = ("image_url", "image_pil", "image_embeds", "image")


def count_images(messages: Iterable[object], most: int = sys.maxsize) -> int:
    """The images of the conversation; counting stops once there are more than `most`.

    Errors: TypeError for content that reading would consume; call `materialise` first.
    """
    count = 0
    for message in _mappings(messages):
        count += sum(map(_is_image, _parts(message)))
        if count > most:
            break
    return count


def image_questions(messages: Iterable[object], longest: int = sys.maxsize) -> list[str]:
    """One question per image of the conversation, in prompt order, of its last `longest`
    characters; "" where none is.

    Text parts, and user messages in a row, are joined by newlines and stripped. An image in a
    system or tool message takes the user's text that follows it; that message's own text is not a
    question. Unknown parts are passed over.

    Errors: TypeError for content that reading would consume; call `materialise` first.
    """
    turns: list[list[tuple[Mapping[str, object], int]]] = [
        []
    ]  # each begins with an assistant message, and holds images
    for message in _mappings(messages):
        if message.get("role") == "assistant":
            turns.append([])
        turns[-1].append((message, sum(map(_is_image, _parts(message)))))
    questions: list[str] = []
    before: Mapping[str, object] = {}  # the last message with text of the user before this place
    earlier = ""
    for turn in turns:
        asked = _asked_from(turn, longest)
        for (message, images), question in zip(turn, asked, strict=True):
            if images and not question:
                question = earlier = earlier or _asked_from([(before, 1)], longest)[0]
            questions.extend([question] * images)
            if _is_user(message) and any(True for _ in _texts(_parts(message))):
                before, earlier = message, ""
    return questions


def _asked_from(turn: Sequence[tuple[Mapping[str, object], int]], longest: int) -> list[str]:
    """Per message of a turn, the end of the user's text from there on, back to the first image."""
    result = [""] * len(turn)
    first = next((place for place, (_, images) in enumerate(turn) if images), len(turn))
    tail = ""
    for place in reversed(range(first, len(turn))):
        message = turn[place][0]
        if _is_user(message):
            tail = _prepended(message, tail, longest)
        result[place] = tail
    return result


def _prepended(message: Mapping[str, object], tail: str, longest: int) -> str:
    """A message's texts and what follows them, cut to the last `longest` characters."""
    pieces, room = [tail] if tail else [], longest - len(tail)
    for text in _texts(reversed(_parts(message))):
        room -= bool(pieces)  # the newline
        if room <= 0:
            break
        pieces.append(text.strip()[-room:])
        room -= len(pieces[-1])
    return tail if pieces == [tail] else "\n".join(reversed(pieces))


def image_details(messages: Iterable[object]) -> list[str | None]:
    """The `image_url.detail` of every image of the conversation, in prompt order; None where it is
    not given.

    Read inside `image_url`, or beside it, where the Responses API has it.

    Errors: TypeError for content that reading would consume; call `materialise` first.
    """
    parts = (part for message in _mappings(messages) for part in _parts(message))
    return [_detail(part) for part in parts if isinstance(part, Mapping) and _is_image(part)]


def materialise(messages: Iterable[object]) -> None:
    """Replace contents that are neither text nor a list by lists, to be read twice; in place."""
    for message in _mappings(messages):
        content = message.get("content")
        if isinstance(content, Iterable) and not isinstance(content, (str, bytes, list, Mapping)):
            message["content"] = list(content)  # type: ignore[index]  # a chat message is a dict


def _mappings(messages: Iterable[object]) -> Iterator[Mapping[str, object]]:
    return (message for message in messages if isinstance(message, Mapping))


def _parts(message: Mapping[str, object]) -> Sequence[object]:
    content = message.get("content")
    if content is None or isinstance(content, (bytes, Mapping)):
        return ()
    if isinstance(content, str):
        return (content,)
    if isinstance(content, Sequence):
        return content
    if isinstance(content, Iterable):
        raise TypeError(
            f"message content is a one-shot {type(content).__name__}: call materialise() before "
            "reading it"
        )
    return ()


def _is_image(part: object) -> bool:
    if not isinstance(part, Mapping):
        return False
    kind = part.get("type")
    if isinstance(kind, str) and kind in _IMAGE_TYPES:
        return True
    return (kind is None or part.get("uuid") is not None) and any(
        key in part for key in _IMAGE_KEYS
    )


def _is_user(message: Mapping[str, object]) -> bool:
    return message.get("role") == "user"


def _texts(parts: Iterable[object]) -> Iterator[str]:
    """Texts of parts that say something, as they stand."""
    for part in parts:
        if isinstance(part, Mapping) and not _is_image(part):
            kind = part.get("type", "text")
            part = part.get("text") if isinstance(kind, str) and kind in _TEXT_TYPES else None
        if isinstance(part, str) and part and not part.isspace():
            yield part


def _detail(part: Mapping[str, object]) -> str | None:
    image_url = part.get("image_url")
    detail = image_url.get("detail") if isinstance(image_url, Mapping) else None
    if detail is None:
        detail = part.get("detail")
    return detail if isinstance(detail, str) else None
