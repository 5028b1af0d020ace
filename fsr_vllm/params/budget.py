"""Budgets as requests and servers write them, one per image or one for all; and ranges."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field

from fsr_vllm.methods import budget as one_budget
from fsr_vllm.methods.budget import MAX_BUDGET, whole

from .wording import LONGEST, cut, shown

MAX_IMAGES = 10_000  # entries of a list; more are refused unread

# For pydantic: `parse_budget` judges, in words of our own; the bounds are for the JSON schema.
Budget = (
    Annotated[int, Field(ge=1, le=MAX_BUDGET)]
    | Annotated[float, Field(gt=0, lt=1)]
    | Literal["off"]
)

_WRITTEN = re.compile(r"\s*([0-9]{1,7})\s*:\s*([0-9]{1,7})\s*", re.ASCII)


class FieldError(ValueError):
    """A value that may not be asked for; `field` names the request field or server option."""

    def __init__(self, field: str, message: str) -> None:
        """A long name is the client's own: neither a log nor an answer repeats all of it."""
        if len(field) > LONGEST:
            message, field = message.replace(field, cut(field)), cut(field)
        super().__init__(message)
        self.field = field


def readable(text: str) -> str:
    """Text that every tokenizer takes: half of a surrogate pair, as JSON can hold it, is none."""
    return text.encode("utf-8", "replace").decode()


def per_image(value: object, count: int, field: str) -> list[Any]:
    """One value per image: a list must have exactly `count` entries, anything else is repeated."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise FieldError(
            field,
            f"{field} has {len(value)} entries for {count} image(s); "
            "give one per image, in prompt order",
        )
    return value


def parse_budget(value: object, field: str = "fsr_budget") -> Budget:
    """One image's budget, as `methods.budget` reads it; FieldError otherwise."""
    try:
        return one_budget.parse_budget(value, field)
    except ValueError as error:
        raise FieldError(field, str(error)) from None


def same_budget(left: object, right: object) -> bool:
    """Whether two budgets as written are one; 64 and 64.0 are, 1 and true are not."""
    if left is right:  # a list of any length, and NaN, which is no budget
        return True
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same_budget, left, right))
    return type(whole(left)) is type(whole(right)) and whole(left) == whole(right)


def parse_budgets(value: object, field: str = "fsr_budget") -> Budget | list[Budget]:
    """One budget for all images, or a list with one per image of the whole conversation."""
    if not isinstance(value, (list, tuple)):
        return parse_budget(value, field)
    if not value:
        raise FieldError(field, f"{field} as a list needs one entry per image; got an empty list")
    if len(value) > MAX_IMAGES:
        raise FieldError(field, f"{field} may have {MAX_IMAGES} entries; got {len(value)}")
    return [parse_budget(item, field) for item in value]


def parse_budget_text(text: str, field: str) -> Budget | list[Budget]:
    """A budget written as text (header, command line): 128, 0.22, off, or a JSON list of these."""
    stripped = text.strip()
    if stripped.lower() in ("off", '"off"'):
        return "off"
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError):
        value = stripped
    return parse_budgets(value, field)


def parse_range(value: object, field: str) -> tuple[int, int]:
    """(low, high) of "LOW:HIGH"; FieldError unless 1 <= LOW <= HIGH <= MAX_BUDGET."""
    match = _WRITTEN.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise FieldError(
            field,
            f"{field} needs its bounds: LOW:HIGH, two numbers of visual tokens per image such as "
            f"64:288 (in YAML within quotes); got {shown(value)}",
        )
    low, high = int(match[1]), int(match[2])
    if not 1 <= low <= high <= MAX_BUDGET:
        raise FieldError(
            field,
            f"{field} LOW:HIGH must satisfy 1 <= LOW <= HIGH <= {MAX_BUDGET:,}; got {shown(value)}",
        )
    return low, high
