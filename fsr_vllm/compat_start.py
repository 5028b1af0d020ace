"""The part of `compat` that concerns the start of a server: the model registry, the device's
memory, and YAML files of options.

The same rules hold: each entry says why it is needed and when it can go;
`tests/compat/test_start.py` fails when one of them moves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from fsr_vllm.compat_patching import wrap_method

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


def device_memory() -> int | None:
    """Bytes of memory of one accelerator; None on a CPU, or where the platform does not say.

    Why: `current_platform.get_device_total_memory` asks without initialising the device, as vLLM
    does itself before it starts its workers. In 0.27-0.32. Can go when vLLM checks what a model
    allocates beside its weights.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return None
    try:
        return int(current_platform.get_device_total_memory())
    except (NotImplementedError, RuntimeError, AttributeError):
        return None


def wrap_config_files(no_options: Callable[[Mapping[str, Any]], list[str]]) -> None:
    """Let no_options(content) add arguments to those vLLM makes of a YAML file; safe to call twice.

    Why: vLLM turns `off` into `--no-NAME`, but only where the parser that reads the file has that
    option; `vllm serve` reads it with the parser above the subcommand's, which has none, and leaves
    the line out unsaid. A method `load_config_file(path) -> list of arguments` in 0.27-0.32. Can go
    when vLLM asks the subcommand's parser.
    """
    import yaml
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def make(stock: Any) -> Any:
        def load_config_file(self: Any, file_path: str) -> list[str]:
            arguments = stock(self, file_path)
            with open(file_path) as file:
                content = yaml.safe_load(file)
            added = no_options(content) if isinstance(content, Mapping) else []
            return [*arguments, *(argument for argument in added if argument not in arguments)]

        return load_config_file

    wrap_method(FlexibleArgumentParser, "load_config_file", make)
