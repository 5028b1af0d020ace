"""Images that come as their embeddings."""

from __future__ import annotations

from fsr_vllm.compat.patching import Entry
from fsr_vllm.compat.types import Items

FEATURE_SIZE = Entry(
    "vllm.multimodal.parse:ImageEmbeddingItems.get_feature_size",
    "vLLM's items of embeddings differ by model; those of one tensor per image know their size.",
    "all of them know it",
    signature="(self, item_idx)",
)


def embedding_rows(images: Items) -> list[int | None]:
    """Rows of each image that came as its embeddings; None for items that do not say."""
    size = getattr(images, FEATURE_SIZE.name, None)
    return [None if size is None else size(index) for index in range(images.get_count())]
