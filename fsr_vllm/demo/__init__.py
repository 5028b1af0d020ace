"""The demo: the bundled model, its pictures, and the command that asks the one about the others."""

from __future__ import annotations

from pathlib import Path

from .asked import Asked, photographs, scenes
from .serving import ENVIRONMENT, MODEL_NAME, SERVE_OPTIONS, serve

__all__ = [
    "ENVIRONMENT",
    "MODEL_NAME",
    "SERVE_OPTIONS",
    "Asked",
    "demo_model",
    "photographs",
    "scenes",
    "serve",
]


def demo_model() -> Path:
    """The folder of the bundled model, a small LLaVA-1.5 (its model card is README.md there)."""
    return Path(__file__).parent / "weights"
