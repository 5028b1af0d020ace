"""The part of `compat` that replaces methods of vLLM's classes: once, and so that it shows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap_method(cls: Any, name: str, make: Callable[[Any], Any]) -> bool:
    """Replace a method of `cls` itself by make(method), once; False if there is none."""
    stock = None if cls is None else cls.__dict__.get(name)
    if stock is None:
        return False
    of_class = isinstance(stock, classmethod)
    function = stock.__func__ if of_class else stock
    if not getattr(function, "_fsr_wrapped", False):
        wrapped: Any = functools.wraps(function)(make(function))
        wrapped._fsr_wrapped = True
        setattr(cls, name, classmethod(wrapped) if of_class else wrapped)
    return True
