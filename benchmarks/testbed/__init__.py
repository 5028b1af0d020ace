"""Small models and pictures to try the plugin on without downloading anything, one of them trained
on our scenes.
"""

from .adapter import build_adapter
from .checkpoint import build_checkpoint, build_clip_less, build_text_model
from .photos import data_url, photos

__all__ = [
    "build_adapter",
    "build_checkpoint",
    "build_clip_less",
    "build_text_model",
    "data_url",
    "photos",
]
