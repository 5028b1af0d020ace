"""vLLM's model registry."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from fsr_vllm.compat.patching import Entry
from fsr_vllm.compat.types import Anything

MODELS = Entry(
    "vllm:ModelRegistry.models",
    "The entries that registering replaces lie here, and nowhere else is a way back to them. A "
    "mapping from architecture to an entry with `module_name` and `class_name`.",
    "models can be registered for one engine alone",
    read="0.27-0.32",
)
RESOLVED = Entry(
    "vllm.model_executor.model_loader.utils:_MODEL_ARCH_BY_HASH",
    "Keeps the class that an architecture had for an earlier engine of the process.",
    "models can be registered for one engine alone",
    read="0.27-0.32",
)

_stock_models: dict[str, Anything] = {}


def put_models(families: Mapping[str, str]) -> None:
    """Register our model classes ("module:class" by architecture) over vLLM's; safe to repeat."""
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
    loader = sys.modules.get(RESOLVED.target.partition(":")[0])
    getattr(loader, RESOLVED.name, {}).clear()
