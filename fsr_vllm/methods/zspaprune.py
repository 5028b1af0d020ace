"""ZSPAPrune: a core that fits the prompt, and diversity around it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from fsr_vllm.kernels import farthest_from_prefix

from .base import Fidelity, Method, Selection, VisualTokens, cosine_similarity, option, topk_stable


@dataclass
class ZSPAPrune(Method):
    """A core of tokens closest to the mean embedding of the prompt, then farthest points from all
    chosen so far.

    Text is the language model's embeddings of the prompt's tokens, in the space of features. The
    core has floor(core_share * K + 0.5) tokens, at least one. The paper sets the share by hand for
    each data set and publishes none; 0.6 is what a third-party port uses, and smaller ones are
    worth trying. That port also fills up with the token least similar to any one chosen token;
    here, as the paper's text has it, with the token whose most similar chosen token is least
    similar (max-min). Without text (T = 0) the core is the first token.

    There is no public program of the authors', and no figure that this could be checked against.
    """

    name: ClassVar[str] = "zspaprune"
    needs: ClassVar[tuple[str, ...]] = ("text",)
    query_aware: ClassVar[bool] = True
    paper: ClassVar[str] = (
        "ZSPAPrune: Zero-Shot Prompt-Aware Token Pruning for Vision-Language Models (arXiv 2510.17197)"
    )
    license: ClassVar[str] = "none published"
    fidelity: ClassVar[Fidelity] = "unchecked"

    core_share: float = option(
        0.6, low=0, high=1, doc="share of K chosen by relevance to the prompt (not published)"
    )

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        text, n = tokens.require("text").float(), tokens.features.shape[1]
        if text.shape[2] != tokens.features.shape[2]:
            raise ValueError(
                f"text must have the width of features, {tokens.features.shape[2]}; got {text.shape[2]}"
            )
        core = max(1, math.floor(self.core_share * k + 0.5)) if text.shape[1] else 1
        prompt = text.sum(1, keepdim=True) / max(1, text.shape[1])
        similarity = cosine_similarity(
            torch.cat([tokens.features.float(), prompt], 1)
        )  # the prompt is row N
        order = topk_stable(similarity[:, n, :n], core)
        return Selection(farthest_from_prefix(similarity[:, :n, :n], order, core, k))
