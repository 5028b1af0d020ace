"""Budgets as requests and servers write them: one per image, one for each, or one total; ranges."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

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

TOTAL = "total"


class Total(BaseModel):
    """A budget over all images of a request together, written {"total": K}."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    total: Annotated[int, Field(ge=1, le=MAX_BUDGET)]

    def __repr__(self) -> str:
        """As requests write it: errors show it."""
        return f'{{"{TOTAL}": {self.total}}}'

    def share(self, sizes: Sequence[int], field: str = "fsr_budget") -> list[int]:
        """Tokens of each image: in proportion to its N = `sizes`, by largest remainders.

        An image keeps at least one token and at most all of its own; together they keep exactly
        min(total, all tokens). Equal remainders go to the earlier image.
        Errors: FieldError where there are more images than tokens.
        """
        if self.total < len(sizes):
            raise FieldError(
                field,
                f"{field} {self!r} is fewer than the {len(sizes)} images of "
                "this request; every image keeps at least one visual token",
            )
        if self.total >= sum(sizes):
            return list(sizes)
        kept = [0] * len(sizes)
        # Whose part is below one token gets one; that lowers the parts of the others in turn.
        while True:
            rest = [place for place, tokens in enumerate(kept) if not tokens]
            left = self.total - (len(sizes) - len(rest))
            whole_size = sum(sizes[place] for place in rest)
            small = [place for place in rest if sizes[place] * left < whole_size]
            if not small:
                break
            for place in small:
                kept[place] = 1
        parts = {place: divmod(sizes[place] * left, whole_size) for place in rest}
        spare = left - sum(part for part, _ in parts.values())
        first = sorted(rest, key=lambda place: (-parts[place][1], place))[:spare]
        for place, (part, _) in parts.items():
            kept[place] = part + (place in first)
        return kept


Asked = Budget | list[Budget] | Total  # what a request may ask for

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
    left, right = _written_total(left), _written_total(right)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same_budget(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same_budget, left, right))
    return type(whole(left)) is type(whole(right)) and whole(left) == whole(right)


def _written_total(value: object) -> object:
    return value.model_dump() if isinstance(value, Total) else value


def parse_total(value: Mapping[str, object], field: str) -> Total:
    """{"total": K} with K from 1 to MAX_BUDGET, also as NumPy's number; FieldError otherwise."""
    known = set(value) == {TOTAL}
    number = whole(value[TOTAL]) if known else None
    is_integer = isinstance(number, Integral) and not isinstance(number, bool)
    if is_integer and 1 <= int(number) <= MAX_BUDGET:  # type: ignore[call-overload]
        return Total(total=int(number))  # type: ignore[call-overload]
    raise FieldError(
        field,
        f'{field} must be, as an object, {{"{TOTAL}": K}} with an integer from 1 to {MAX_BUDGET:,} '
        f"(visual tokens kept of all images together); got {shown(dict(value))}",
    )


def parse_budgets(value: object, field: str = "fsr_budget") -> Asked:
    """One budget for each image, a list with one per image of the whole conversation, or a total
    over all of them.
    """
    if isinstance(value, Total):
        return value
    if isinstance(value, Mapping):
        return parse_total(value, field)
    if not isinstance(value, (list, tuple)):
        return parse_budget(value, field)
    if not value:
        raise FieldError(field, f"{field} as a list needs one entry per image; got an empty list")
    if len(value) > MAX_IMAGES:
        raise FieldError(field, f"{field} may have {MAX_IMAGES} entries; got {len(value)}")
    if any(isinstance(item, (Mapping, Total)) for item in value):
        raise FieldError(
            field,
            f'{field}: {{"{TOTAL}": K}} is for all images of a request and cannot be an entry of a '
            "list; give the total alone, or one budget per image",
        )
    return [parse_budget(item, field) for item in value]


def parse_budget_text(text: str, field: str) -> Asked:
    """A budget written as text (header, model name): 128, 0.22, off, or JSON: a list of these, or
    {"total": K}.
    """
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
