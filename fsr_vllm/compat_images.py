"""The part of `compat` that concerns a prompt's images and texts as vLLM holds them before they are processed.

Same rules as there: each entry says why it is needed, in which versions it was read or run, and when it can go.
"""

from __future__ import annotations

from typing import Any


def image_limit(model_config: Any) -> int:
    """The most images a prompt may hold (`--limit-mm-per-prompt`).

    Why: a conversation is read for its images' questions before vLLM counts them, and what vLLM is going to refuse must
    not cost anything here. A model may allow fewer, never more. Same method in 0.26-0.33. Can go when a renderer's hook
    comes after that count.
    """
    config = model_config.multimodal_config
    return config.get_limit_per_prompt("image") if config is not None else 0


def embedding_rows(images: Any) -> list[int] | None:
    """Rows of each image that came as its embeddings; None where this cannot be said of such items.

    Why: vLLM's items of embeddings differ by model; those of one tensor per image know their size. Read in 0.26-0.33,
    run in 0.32. Can go when all of them do.
    """
    size = getattr(images, "get_feature_size", None)
    return None if size is None else [size(index) for index in range(images.get_count())]
