"""Names of ours on objects of vLLM."""

from __future__ import annotations

RESULT_KEY = "fsr"  # of a processed input: the `params.Report` of its images
