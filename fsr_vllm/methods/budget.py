"""One image's budget as people write it: an integer, a share, or "off"; and what it comes to."""

from __future__ import annotations

import math
import reprlib
from numbers import Integral, Real
from typing import Literal

Budget = int | float | Literal["off"]

MAX_BUDGET = 1_000_000

_ALLOWED = (
    f"an integer from 1 to {MAX_BUDGET:,} (visual tokens kept per image), "
    'a number above 0 and below 1 (share kept), or "off"'
)


def parse_budget(value: object, name: str = "budget") -> Budget:
    """Tokens kept (int), share kept (0 < float < 1), or "off"; ValueError that names it otherwise.

    A whole number written as a float is that integer, but for 1.0. NumPy's numbers are taken too,
    and come back as Python's.
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
        raise ValueError(
            f"{name} must be {_ALLOWED}; got 1.0, which could mean one token or the whole image: "
            'write 1 or "off"'
        )
    raise ValueError(f"{name} must be {_ALLOWED}; got {reprlib.repr(value)[:80]}")


def whole(value: object) -> object:
    """A float above 1 that is a whole number, as that integer; anything else as it is."""
    if isinstance(value, Real) and not isinstance(value, Integral) and float(value) > 1.0:
        number = float(value)
        return int(number) if number.is_integer() else value  # infinity is no integer
    return value


def resolve_budget(budget: Budget, total: int) -> int:
    """K, the tokens kept of `total`: min(budget, N), max(1, floor(share * N + 0.5)), or all."""
    if budget == "off":
        return total
    if isinstance(budget, float):
        return max(1, math.floor(budget * total + 0.5))
    return min(int(budget), total)
