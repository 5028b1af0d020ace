"""Focus-Scan-Refine visual token pruning for vLLM.

Names are loaded when first used: vLLM imports this package in every process to find its plugin,
torch can wait.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .methods import MethodInfo, PrunedTokens, VisualTokens, get_method, list_methods, prune

__version__ = "0.1.0"
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


def stats(llm: Any) -> dict[str, Any]:
    """Counts of pruned images and kept tokens of a running `vllm.LLM`."""
    from .engine.stats import stats as worker_stats

    return worker_stats(llm)


def visual_tokens(output: Any) -> tuple[int, int] | None:
    """Visual tokens kept and total of one request output of LLM, LLMEngine or AsyncLLM; (0, 0) if
    it had no images.

    None where they are not known: the output was made in a process without the active plugin, or by
    hand.
    """
    return getattr(output, "fsr_visual_tokens", None)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.methods"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
