"""vLLM's model registry, and the state that child processes inherit."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

# Set by a front end that leaves the plugin aside, for its child processes, which register models
# before they know any configuration.
IGNORING = "FSR_IGNORING"


_stock_models: dict[str, Any] = {}


def put_models(families: Mapping[str, str]) -> None:
    """Register our model classes ("module:class" by architecture) over vLLM's own; safe to repeat.

    Why: `ModelRegistry.models` is where the entries lie that registering replaces, and the only way
    back to them. A mapping from architecture to entry in 0.27-0.32. Can go when models can be
    registered for one engine alone.
    """
    from vllm import ModelRegistry

    for architecture, target in families.items():
        entry = ModelRegistry.models.get(architecture)
        if f"{getattr(entry, 'module_name', None)}:{getattr(entry, 'class_name', None)}" == target:
            continue
        _stock_models[architecture] = entry
        ModelRegistry.register_model(architecture, target)
        _forget_resolved()


def put_stock_models() -> None:
    """Undo `put_models`."""
    from vllm import ModelRegistry

    for architecture, entry in _stock_models.items():
        if entry is not None:
            ModelRegistry.models[architecture] = entry
    _stock_models.clear()
    _forget_resolved()


def _forget_resolved() -> None:
    """Why: `_MODEL_ARCH_BY_HASH` keeps the class that an architecture had for an earlier engine. In
    0.27-0.32.
    """
    loader = sys.modules.get("vllm.model_executor.model_loader.utils")
    getattr(loader, "_MODEL_ARCH_BY_HASH", {}).clear()


def inherited_ignoring() -> bool:
    """Whether this process, or the one that started it, leaves the plugin aside."""
    return os.environ.get(IGNORING) == "1"


def leave_aside() -> bool:
    """Models are vLLM's own, here and in child processes; returns whether that is new."""
    new = not inherited_ignoring()
    os.environ[IGNORING] = "1"
    put_stock_models()
    return new


def take_up(families: Mapping[str, str]) -> None:
    """The opposite of `leave_aside`: a process may have several engines, one after another."""
    os.environ.pop(IGNORING, None)
    put_models(families)
