"""The device's memory."""

from __future__ import annotations


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
