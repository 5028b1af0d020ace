"""The contract of every pruning method: what comes in, what goes out, and the checks in between.

A method is a dataclass whose fields are its hyper-parameters (see `option`) and which overrides one
function: `ScoreMethod.score` if it keeps the K best of one score, `Method.select` otherwise. It
always sees a batch (B, N, ...), only the signals it declared in `needs` and `uses`, and K < N; it
never checks, sorts, or casts back.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .budget import Budget, parse_budget, resolve_budget
from .checks import checked_fields
from .ops import (
    best_mask,
    cosine_similarity,
    cosines_by_halves,
    each_image,
    gather_rows,
    indices_of,
    mask_of,
    minmax,
    normalise,
    region_bounds,
    regions,
    square_grid,
    topk_stable,
)
from .options import PerToken, check_options, option

__all__ = [
    "Fidelity", "Method", "PerToken", "PrunedTokens", "ScoreMethod", "Selection", "VisualTokens",
    "best_mask", "cosine_similarity", "cosines_by_halves", "each_image", "gather_rows",
    "indices_of", "mask_of", "minmax", "normalise", "option", "region_bounds", "regions",
    "square_grid", "topk_stable",
]  # fmt: skip

Fidelity = Literal["exact", "unchecked", "stage-1", "input-probe", "control"]


@dataclass(eq=False)
class VisualTokens:
    """The N visual tokens of one image; of a batch every field but grid and group has B in front.

    Signals are unscaled and higher means more. A method reads those it needs and uses, no others.
    """

    features: Tensor  # (N, D): the rows that are returned
    saliency: Tensor | None = None  # (N,): [CLS] attention or attention received, a late layer
    relevance: Tensor | None = None  # (N,): similarity to the question
    metric: Tensor | None = None  # (N, Dm): where to measure distances, as before the projector
    keys: Tensor | None = None  # (N, Dk): keys of the saliency layer
    cls_row: Tensor | None = None  # (D,): the [CLS] token, brought into the space of features
    shallow_saliency: Tensor | None = None  # (N,): saliency of an early layer
    # (N,): attention received, mean over heads and all queries with [CLS]; a late, an early layer
    received: Tensor | None = None
    shallow_received: Tensor | None = None
    attention: Tensor | None = None  # (N, N): head-mean attention; row = query, column = key
    last_query: Tensor | None = None  # (C,): the [CLS] query of the tower's last block
    last_key: Tensor | None = None  # (N, C), or (N + 1, C) with [CLS] first: keys of that block
    # (T, Dt): embeddings of the question's tokens; (P, D): a codebook. Without B: for all images.
    text: Tensor | None = None
    prototypes: Tensor | None = None
    grid: tuple[int, int] | None = None  # (h, w) with h * w = N, of every image
    frame_weights: Tensor | None = None  # (F,): importance of each of F equal runs of tokens
    probe: Tensor | None = None  # (N, ...): what the first decoder layers say about each token
    # (B,) integers: rows with the same id are scaled jointly (tiles of one image)
    group: Tensor | None = None

    def require(self, name: str) -> Tensor:
        """The field `name`; ValueError if it was not given."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{name} is needed and was not given")
        return value


@dataclass(eq=False)
class PrunedTokens:
    """The K tokens kept of one image, in the image's own order; with B in front of a batch.

    All fields are tensors on the device of the features, so that nothing here waits for it.
    """

    tokens: Tensor  # (K, D), dtype of features: the rows, some of them merged or pooled
    indices: Tensor  # (K,) int64, ascending, unique: the place of each row among the N
    is_focus: Tensor  # (K,) bool: False only for FSR's scan anchors
    merged_into: Tensor  # (N,) int64: place of the kept token that this one was merged into, or -1
    # () int64: FSR's literal K_F before clamping; of other methods, and of an unpruned image, K
    k_focus: Tensor
    num_focus: Tensor  # () int64: kept by focus; of other methods, and of an unpruned image, K
    num_scan: Tensor  # () int64: kept by FSR's scan, K - num_focus; else 0
    num_merged: Tensor  # () int64: tokens merged into a kept one, those of merged_into >= 0

    def of(self, image: int) -> PrunedTokens:
        """One image of a batch: views of its part of every field, without a wait for the device."""
        if self.tokens.dim() != 3:
            raise ValueError("only the tokens of a batch can be cut to one image")
        return PrunedTokens(*(getattr(self, item.name)[image] for item in fields(self)))


@dataclass(eq=False)
class Selection:
    """What a method decides for a batch: which K tokens, and what it did to their rows.

    None stands for the plain case: the features themselves, all kept for their own sake, no merge.
    """

    indices: Tensor  # (B, K) int64, unique, in any order
    rows: Tensor | None = None  # (B, K, D), in the order of indices: merged or pooled rows
    is_focus: Tensor | None = None  # (B, K) bool, in the order of indices
    merged_into: Tensor | None = None  # (B, N) int64
    k_focus: Tensor | None = None  # (B,) int64, as the three below
    num_focus: Tensor | None = None
    num_scan: Tensor | None = None
    num_merged: Tensor | None = None


@dataclass
class Method:
    """A pruning method: subclass as a dataclass, fill in the class variables, override `select`."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # fields of VisualTokens it cannot run without
    uses: ClassVar[tuple[str, ...]] = ()  # fields it profits from where given
    # Block of a 24-block tower, from 0, that its shallow_* signals are read at.
    shallow_layer: ClassVar[int] = 0
    servable: ClassVar[bool] = True  # whether a server can form what it needs, for some model
    query_aware: ClassVar[bool] = False  # whether the result can depend on the question
    paper: ClassVar[str] = ""
    license: ClassVar[str] = ""  # of the authors' published code
    fidelity: ClassVar[Fidelity] = "exact"

    def __post_init__(self) -> None:
        """Check the options; an int given for a float becomes one."""
        check_options(self)

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        """Choose k of the N > k tokens of each image of the batch."""
        raise NotImplementedError

    def prune(self, tokens: VisualTokens, budget: Budget, *, validate: bool = True) -> PrunedTokens:
        """Keep exactly K tokens per image: K = min(budget, N), a share of N, or all if "off".

        K = N returns the features unchanged. ValueError for a wrong budget or shape and for a
        missing signal, always. NaN and Inf are looked for only with `validate`, since that waits
        for the device; without it nothing here does.
        """
        asked = parse_budget(budget)
        batch = checked_fields(tokens, self, finite=validate)
        n = batch.features.shape[1]
        k = resolve_budget(asked, n)
        pruned = _keep_all(batch) if k == n else _assemble(batch, self.select(batch, k))
        return pruned if tokens.features.dim() == 3 else pruned.of(0)


@dataclass
class ScoreMethod(Method):
    """A method that keeps the K of highest score, ties to the lower index: override `score`."""

    def score(self, tokens: VisualTokens) -> Tensor:
        """One score per token, (B, N), higher = kept first."""
        raise NotImplementedError

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        """The k tokens of highest score."""
        return Selection(topk_stable(self.score(tokens).float(), k))


def _keep_all(tokens: VisualTokens) -> PrunedTokens:
    b, n, _ = tokens.features.shape
    everything = torch.arange(n, device=tokens.features.device).repeat(b, 1)
    return _result(tokens.features, everything, n, Selection(everything))


def _assemble(tokens: VisualTokens, chosen: Selection) -> PrunedTokens:
    """Ascending order and the dtype of the features."""
    indices, order = chosen.indices.sort(dim=-1)
    source, where = (tokens.features, indices) if chosen.rows is None else (chosen.rows, order)
    if chosen.is_focus is not None:
        chosen.is_focus = chosen.is_focus.gather(1, order)
    return _result(
        gather_rows(source, where).to(tokens.features.dtype),
        indices,
        tokens.features.shape[1],
        chosen,
    )


def _result(rows: Tensor, indices: Tensor, n: int, chosen: Selection) -> PrunedTokens:
    """Plain values where the method left them open."""
    (b, k), device = indices.shape, indices.device
    kept, none = torch.full((b,), k, device=device), torch.zeros(b, dtype=torch.long, device=device)
    plain = {
        "is_focus": torch.ones(b, k, dtype=torch.bool, device=device),
        "merged_into": torch.full((b, n), -1, device=device),
        "k_focus": kept, "num_focus": kept, "num_scan": none, "num_merged": none,
    }  # fmt: skip
    given = {name: getattr(chosen, name) for name in plain}
    found = {name: plain[name] if given[name] is None else given[name] for name in plain}
    return PrunedTokens(rows, indices, **found)
