"""What methods score by: saliency of the vision tower and relevance to the question.

Pure torch: neither vLLM nor transformers is imported here, and nothing else of this package.
"""

from .relevance import (
    clip_relevance,
    embedding_relevance,
    known_partner,
    pool_chunks,
    relevance_sign,
    wrap_chunks,
)
from .saliency import attention_map, cls_attention, received_attention

__all__ = [
    "attention_map",
    "clip_relevance",
    "cls_attention",
    "embedding_relevance",
    "known_partner",
    "pool_chunks",
    "received_attention",
    "relevance_sign",
    "wrap_chunks",
]
