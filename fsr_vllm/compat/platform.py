"""The device's memory."""

from __future__ import annotations

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
