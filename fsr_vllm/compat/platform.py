"""Memory of the device and of this machine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fsr_vllm.compat.patching import Entry

TOTAL_MEMORY = Entry(
    "vllm.platforms:current_platform.get_device_total_memory",
    "Tells a cache that is larger than the device before anything starts; asks without "
    "initialising the device, as vLLM does itself.",
    "vLLM checks what a model allocates beside its weights",
    read="0.27-0.32",
)


def device_memory() -> int | None:
    """Bytes of memory of one accelerator; None on a CPU, or where the platform does not say."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return None
    try:
        return int(current_platform.get_device_total_memory())
    except (NotImplementedError, RuntimeError, AttributeError):
        return None


def host_memory() -> int | None:
    """Bytes of memory of this machine or its container; None where nothing says so."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no bound
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)
