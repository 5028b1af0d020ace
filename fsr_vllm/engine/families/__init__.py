"""One file per model family; this table is all that has to know them.

vLLM's registry is given names of this package: it inspects a class in a process of its own and
keeps the result by the contents of these files, so that a change in any of them is seen.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Family

_OBJECTS = {  # architecture: "file:family object"
    "LlavaForConditionalGeneration": "llava:LLAVA",
    "LlavaNextForConditionalGeneration": "llava_next:LLAVA_NEXT",
}
PREFIX = "Fsr"

# What vLLM's model registry is given for each architecture.
FAMILIES = {name: f"{__name__}:{PREFIX}{name}" for name in _OBJECTS}


@functools.cache
def family(architecture: str) -> Family:
    """The family of one of the architectures in FAMILIES; imports no model code."""
    file, _, name = _OBJECTS[architecture].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{file}"), name)


def family_of(architectures: Iterable[str]) -> Family | None:
    """The family of the first of a model config's architectures that has one."""
    return next((family(name) for name in architectures if name in _OBJECTS), None)


@functools.cache
def _built(architecture: str) -> type:
    from .factory import build

    return build(family(architecture))


def __getattr__(name: str) -> type:
    """`FsrARCHITECTURE`: the vLLM model class of a family, built when vLLM asks for it."""
    architecture = name.removeprefix(PREFIX)
    if architecture == name or architecture not in _OBJECTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _built(architecture)
