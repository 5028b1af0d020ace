"""Hyper-parameters as dataclass fields: what each may be, and the error where it is not."""

from __future__ import annotations

import reprlib
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

if TYPE_CHECKING:
    from .base import Method

T = TypeVar("T")


@dataclass(frozen=True)
class PerToken:
    """The least value that a request may ask for on an image of N tokens: N / `tokens`, rounded up.

    For options below which the cost of a method grows faster than that of comparing all pairs: a
    request runs inside the engine's step, and all others wait for it. The default is always
    allowed; outside a server there is no bound.
    """

    tokens: int

    def least(self, n: int) -> int:
        """N / tokens, rounded up."""
        return -(-n // self.tokens)

    def __str__(self) -> str:
        """The bound in words, for lists of options."""
        return f"at least N / {self.tokens}"


def option(
    default: T,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    doc: str = "",
    served: PerToken | None = None,
) -> T:
    """A hyper-parameter of the default's type, from low to high, both included.

    An int will do for a float. `served`: the bound of requests, where they have one of their own.
    """
    about = {"low": low, "high": high, "choices": choices, "doc": doc, "served": served}
    return field(default=default, metadata=about)


_MOST = 1e6  # of a hyper-parameter that is not a count


def check_options(method: Method) -> None:
    """ValueError that names the option and what is allowed; an int for a float becomes one."""
    for item in fields(method):
        value = getattr(method, item.name)
        if not _fits(value, item):
            raise ValueError(f"{item.name} must be {allowed(item)}; got {reprlib.repr(value)[:80]}")
        if isinstance(item.default, float):
            setattr(method, item.name, float(value))


def beyond_serving(method: Method, n: int) -> str | None:
    """Why a server does not run this method on an image of n tokens; None if it does."""
    for item in fields(method):
        served, value = item.metadata.get("served"), getattr(method, item.name)
        if served is not None and value != item.default and value < served.least(n):
            return (
                f"{item.name} must be at least {served.least(n)} in a request about an image "
                f"of {n:,} visual tokens "
                f"(N / {served.tokens}), or left out; got {value}"
            )
    return None


def allowed(item: Field[Any]) -> str:
    """What may be given for this field, in words."""
    if choices := item.metadata.get("choices"):
        return "one of " + ", ".join(map(repr, choices))
    if not _is_number(item.default):
        return f"of type {type(item.default).__name__}"
    low, high = item.metadata.get("low"), item.metadata.get("high")
    bounds = [f">= {low}"] * (low is not None) + [f"<= {high}"] * (high is not None)
    kind = "a finite number" if isinstance(item.default, float) else "an integer"
    return " ".join([kind, " and ".join(bounds)]).strip()


def _fits(value: object, item: Field[Any]) -> bool:
    if choices := item.metadata.get("choices"):
        return isinstance(value, str) and value in choices
    if not _is_number(item.default):
        return isinstance(value, type(item.default))
    if not _is_number(value) or not (isinstance(value, int) or isinstance(item.default, float)):
        return False
    # Beyond these sizes no option means anything, and float32 and int64 arithmetic would overflow
    # far from here.
    if not abs(value) <= (_MOST if isinstance(item.default, float) else 2**63 - 1):
        return False
    low, high = item.metadata.get("low"), item.metadata.get("high")
    return (low is None or value >= low) and (high is None or value <= high)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
