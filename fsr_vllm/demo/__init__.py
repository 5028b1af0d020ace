"""The demo: the bundled model, its pictures, and the command that serves the one and asks about
the others.
"""

from __future__ import annotations

from pathlib import Path

from .command import ENVIRONMENT, MODEL_NAME, SERVE_OPTIONS, run, scenes, serve

__all__ = ["ENVIRONMENT", "MODEL_NAME", "SERVE_OPTIONS", "demo_model", "run", "scenes", "serve"]


def demo_model() -> Path:
    """The folder of the bundled model, a small LLaVA-1.5 (its model card is README.md there)."""
    return Path(__file__).parent / "weights"
