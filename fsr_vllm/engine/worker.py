"""What a worker can be asked over collective_rpc, and the same for an offline `LLM`."""

from __future__ import annotations

from typing import Any

import torch

from fsr_vllm.compat.front_end import front_end_processor


class FsrWorkerExtension:
    """Mixed into vLLM's worker class; names are prefixed because they share its namespace."""

    def fsr_stats(self) -> dict[str, float]:
        """Counts and seconds since the start: images, kept rows, FSR's stages, time in the tower
        and in selection.

        `tower_images` went through the vision tower; feature_* tell of the cache that spares it,
        absent when it is off.
        """
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        if not getattr(model, "fsr_active", False):
            return {}
        counts = {
            name: float(value) if isinstance(value, torch.Tensor) else value
            for name, value in model.fsr_counts.items()
        }
        if model.fsr_cache is not None:
            counts |= model.fsr_cache.stats()
        return counts | {
            f"seconds_{part}": seconds for part, seconds in model.fsr_clock.read().items()
        }


def stats(llm: Any) -> dict[str, Any]:
    """Visual tokens kept and total of an offline `LLM` so far, and its workers' statistics.

    Keys: images, pruned_images, visual_tokens_kept, visual_tokens_total (as requested, caches
    included), preprocessed_images and the pixel cache's pixel_* of this process, and `workers`, one
    dict per worker with what was computed (see FsrWorkerExtension.fsr_stats). Errors: ValueError if
    the plugin is not active in this `LLM`.
    """
    processor = front_end_processor(llm)
    if getattr(processor, "fsr_settings", None) is None:
        raise ValueError('plugin fsr is not active in this LLM; pass additional_config={"fsr": {}}')
    return {**processor.fsr_stats(), "workers": llm.collective_rpc("fsr_stats")}
