"""One image's budget as requests and servers write it: an integer, a share or "off"; a range."""

from __future__ import annotations

import json
import math
import re
from numbers import Integral, Real
from typing import Annotated, Any, Literal

from pydantic import Field

from .wording import LONGEST, cut, shown

MAX_BUDGET = 1_000_000
MAX_IMAGES = 10_000  # entries of a list; more are refused unread

# For pydantic: `parse_budget` judges, in words of our own; the bounds are for the JSON schema.
Budget = (
    Annotated[int, Field(ge=1, le=MAX_BUDGET)]
    | Annotated[float, Field(gt=0, lt=1)]
    | Literal["off"]
)

_WRITTEN = re.compile(r"\s*([0-9]{1,7})\s*:\s*([0-9]{1,7})\s*", re.ASCII)

_BUDGET_ALLOWED = (
    f"an integer from 1 to {MAX_BUDGET:,} (visual tokens kept per image), "
    'a number above 0 and below 1 (share kept), or "off"'
)


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
    """One image's budget: tokens kept (int), share kept (0 < float < 1), or "off".

    Errors: FieldError. A whole number written as a float is that integer, but for 1.0. Offline
    callers may also give NumPy's numbers, which come back as Python's.
    """
    if isinstance(value, str) and value == "off":
        return "off"
    value = whole(value)
    if isinstance(value, Integral):
        if not isinstance(value, bool) and 1 <= int(value) <= MAX_BUDGET:
            return int(value)
    elif isinstance(value, Real) and 0.0 < float(value) < 1.0:  # NaN fails both comparisons
        return float(value)
    elif isinstance(value, Real) and float(value) == 1.0:
        raise FieldError(
            field,
            f"{field} must be {_BUDGET_ALLOWED}; got 1.0, which could mean one token or the whole "
            'image: write 1 or "off"',
        )
    raise FieldError(field, f"{field} must be {_BUDGET_ALLOWED}; got {shown(value)}")


def whole(value: object) -> object:
    """A float above 1 that is a whole number, as that integer; anything else as it is."""
    if isinstance(value, Real) and not isinstance(value, Integral) and float(value) > 1.0:
        number = float(value)
        return int(number) if number.is_integer() else value  # infinity is no integer
    return value


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


def resolve_budget(budget: Budget, total: int) -> int:
    """Tokens kept of `total`: min(budget, N), or max(1, floor(share * N + 0.5)), or all."""
    if budget == "off":
        return total
    if isinstance(budget, float):
        return max(1, math.floor(budget * total + 0.5))
    return min(int(budget), total)
