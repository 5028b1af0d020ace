"""Names of ours on objects of vLLM."""

from __future__ import annotations

RESULT_KEY = "fsr_visual_tokens"  # (kept, total) on a processed input


ADAPTIVE_KEY = (
    "fsr_adaptive"  # the budget that the load gave its images, where the request named none
)
