"""The part of `compat` that concerns images that come as their embeddings.

Same rules as there: each entry says why it is needed, in which versions it was read or run, and
when it can go.
"""

from __future__ import annotations

from typing import Any


def embedding_rows(images: Any) -> list[int | None]:
    """Rows of each image that came as its embeddings; None for items that do not say.

    Why: vLLM's items of embeddings differ by model; those of one tensor per image know their size.
    Read in 0.26-0.33, run in 0.32. Can go when all of them do.
    """
    size = getattr(images, "get_feature_size", None)
    return [None if size is None else size(index) for index in range(images.get_count())]
