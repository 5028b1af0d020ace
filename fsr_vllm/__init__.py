"""Focus-Scan-Refine visual token pruning for vLLM.

vLLM imports this package in every process to find its plugin, so torch is not imported here:
`VisualTokens` and `PrunedTokens`, which need it, are loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .methods import MethodInfo, get_method, list_methods, prune

if TYPE_CHECKING:
    from .methods import PrunedTokens, VisualTokens

__version__ = "0.2.0"
__all__ = [
    "MethodInfo",
    "PrunedTokens",
    "VisualTokens",
    "__version__",
    "get_method",
    "list_methods",
    "prune",
    "stats",
    "visual_tokens",
]


def stats(llm: object) -> dict[str, Any]:
    """Counts of pruned images and kept tokens of a running `vllm.LLM`."""
    from .engine.stats import stats as worker_stats

    return worker_stats(llm)


def visual_tokens(output: object) -> tuple[int, int] | None:
    """Visual tokens kept and total of one output of LLM, LLMEngine or AsyncLLM.

    (0, 0) if the request had no images. None where the numbers are not known: the output was made
    in a process without the active plugin, or by hand.
    """
    return getattr(output, "fsr_visual_tokens", None)


def __getattr__(name: str) -> object:
    if name not in ("PrunedTokens", "VisualTokens"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import methods

    return getattr(methods, name)


def __dir__() -> list[str]:
    return sorted(__all__)
