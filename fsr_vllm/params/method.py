"""A method by name and options, as requests and servers ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fsr_vllm.methods import RENAMED, get_method, list_methods

from .budget import FieldError
from .wording import LONGEST, cut, did_you_mean, shown

if TYPE_CHECKING:
    from fsr_vllm.methods.base import Method


def served_methods() -> list[str]:
    """The methods that a server can run; others are for the Python API alone."""
    return [name for name, info in list_methods().items() if info.servable]


def known_method(name: str, field: str) -> str:
    """The name itself; FieldError, with the methods that can be served, if it is none."""
    if name not in list_methods():
        known = served_methods()
        renamed = RENAMED.get(name)
        near = f"; it is now called {renamed}" if renamed else did_you_mean(name, known)
        raise FieldError(
            field, f"{field} must be one of {', '.join(known)}; got {shown(name)}{near}"
        )
    return name


def joint_tiles(options: Mapping[str, Any] | None) -> bool:
    """Whether `tiles` among a request's options is "joint": all tiles of an image are one set of
    tokens, where otherwise ("split") a budget is divided over them. FieldError for other values.
    """
    given = (options or {}).get("tiles", "split")
    if given not in ("split", "joint"):
        raise FieldError(
            "fsr_options",
            f'fsr_options.tiles must be "split", "joint" or absent; got {shown(given)}',
        )
    return bool(given == "joint")


def build_method(method: str, options: Mapping[str, Any] | None) -> Method:
    """The method with the defaults of its preset, then `options`; FieldError if wrong.

    `preset` and `tiles` are options of every method, and not handed to it.
    """
    given = dict(options or {})
    joint_tiles(given)
    given.pop("tiles", None)
    preset = given.pop("preset", None)
    if preset not in (None, "paper", "served"):
        raise FieldError(
            "fsr_options",
            f'fsr_options.preset must be "paper", "served" or absent; got {shown(preset)}',
        )
    long = next((name for name in given if len(name) > LONGEST), None)
    if long is not None:
        raise FieldError(
            "fsr_options", f"fsr_options: method {method!r} has no option {cut(long)!r}"
        )
    try:
        return get_method(method, preset=preset or "served", **given)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise FieldError("fsr_options", f"fsr_options: {str(error)[:500]}") from None
