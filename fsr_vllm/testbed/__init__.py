"""Small models and pictures to try the plugin on without downloading anything, one of them trained
on our scenes.
"""

from pathlib import Path

from .checkpoint import build_checkpoint, build_clip_less, build_text_model
from .photos import data_url, photos

__all__ = [
    "build_checkpoint",
    "build_clip_less",
    "build_text_model",
    "data_url",
    "demo_model",
    "photos",
]


def demo_model() -> Path:
    """The folder of the bundled model: LLaVA-1.5's architecture, trained by `python -m
    fsr_vllm.testbed.train`.
    """
    return Path(__file__).parent / "weights"
