"""Which tokens: the pruning methods, each one file, behind one function.

Importing this package does not import torch: servers ask for names and options alone.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .budget import Budget
from .registry import RENAMED, SERVED_DEFAULTS, MethodInfo, get_method, list_methods

if TYPE_CHECKING:
    from torch import Tensor

    from .base import Method, PrunedTokens, VisualTokens

_Keyword = Any  # a signal or an option: told apart by name, and checked where it is used

__all__ = [
    "RENAMED", "SERVED_DEFAULTS", "Budget", "Method", "MethodInfo", "PrunedTokens", "VisualTokens",
    "get_method", "list_methods", "prune",
]  # fmt: skip


def prune(
    features: Tensor,
    *,
    budget: Budget,
    saliency: Tensor | None = None,
    relevance: Tensor | None = None,
    method: str = "fsr",
    preset: str = "paper",
    **more: _Keyword,
) -> PrunedTokens:
    """Keep K of the N rows of features (N, D) or (B, N, D) by `method`.

    budget: an integer, a share of N, or "off", as in requests. saliency, relevance and, by name,
    any other field of `VisualTokens`: the signals of these tokens. preset: the options to start
    from, "paper" for the published ones, "served" for those of a server; further keywords are
    options of the method. ValueError for an unknown method or option, a missing signal, a wrong
    shape, NaN or Inf.
    """
    from .base import VisualTokens

    signals = {item.name: more.pop(item.name) for item in fields(VisualTokens) if item.name in more}
    tokens = VisualTokens(features, saliency=saliency, relevance=relevance, **signals)
    return get_method(method, preset=preset, **more).prune(tokens, budget)


def __getattr__(name: str) -> object:
    if name not in ("Method", "PrunedTokens", "VisualTokens"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import base

    return getattr(base, name)
