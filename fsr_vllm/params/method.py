"""A method by name and options, as requests and servers ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .budget import FieldError
from .wording import LONGEST, cut, did_you_mean, shown

# Laid under a request's `fsr_options`; {"preset": "paper"} drops it. Decided by measurement only: a
# method that is not listed is served with its published defaults. FSR's:
# benchmarks/results/accuracy.md (docs/testbed.md says how).
SERVED_DEFAULTS: dict[str, dict[str, Any]] = {
    "fsr": {"alpha": 3.0, "max_focus_share": 0.06, "scan": "relevance", "scan_gamma": 2.0}
}


def served_methods() -> list[str]:
    """The methods that a server can run; others are for the Python API alone."""
    from fsr_vllm.methods import list_methods

    return [name for name, info in list_methods().items() if info.servable]


def known_method(name: str, field: str) -> str:
    """The name itself; FieldError, with the methods that can be served and the nearest of them, if
    it is none.
    """
    from fsr_vllm.methods import list_methods

    if name not in list_methods():
        known = served_methods()
        near = did_you_mean(name, known)
        raise FieldError(
            field, f"{field} must be one of {', '.join(known)}; got {shown(name)}{near}"
        )
    return name


def build_method(method: str, options: Mapping[str, Any] | None) -> Any:
    """The method with published defaults, then served defaults, then `options`; FieldError if
    wrong.
    """
    from fsr_vllm.methods import get_method

    given = dict(options or {})
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
    served = {} if preset == "paper" else SERVED_DEFAULTS.get(method, {})
    try:
        return get_method(method, **{**served, **given})
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise FieldError("fsr_options", f"fsr_options: {str(error)[:500]}") from None
