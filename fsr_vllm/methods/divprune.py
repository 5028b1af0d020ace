"""DivPrune: the K tokens that are farthest apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fsr_vllm.kernels import farthest_from_prefix

from .base import Method, Selection, VisualTokens, cosine_similarity


@dataclass
class DivPrune(Method):
    """Max-min diversity: round by round the token whose nearest chosen token is farthest away, by 1
    - cosine.

    The first is the token whose nearest other token is farthest away. The paper's arithmetic is
    half precision and relies on chosen tokens being at distance 0, so exact duplicates can be
    picked twice; here distances are float32 and chosen tokens are masked. The paper compares all
    tiles and newline tokens of a prompt jointly; here a row is pruned by itself, so whoever wants
    that scope passes the tiles of an image as one row.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = (
        "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (arXiv 2503.02175)"
    )
    license: ClassVar[str] = "CC BY-NC 4.0 (ours is written from the description alone)"

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        similarity = cosine_similarity(tokens.features)
        itself = torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device)
        nearest = 1 - similarity.masked_fill(itself, -torch.inf).amax(-1)
        first = nearest.argmax(-1, keepdim=True)
        return Selection(farthest_from_prefix(similarity, first, 1, k))
