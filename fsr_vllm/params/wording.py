"""Words of error messages: what was written, cut short, and what may have been meant."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

LONGEST = 80  # characters of a name or value that is not ours


def cut(name: object) -> str:
    """A name for an error message, cut short: it is the client's, and may be of any length."""
    return str(name)[:LONGEST]


def shown(value: object) -> str:
    """A value for an error message, cut short: it is the client's, and may be anything."""
    return reprlib.repr(value)[:LONGEST]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question that offers the nearest of the known words; nothing where none is near."""
    near = difflib.get_close_matches(cut(word).lower(), list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""
