"""The contract of every pruning method: what comes in, what goes out, and the checks in between,
once for all.

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

from .checks import checked_fields
from .ops import cosine_similarity, gather_rows, indices_of, mask_of, minmax, normalise, topk_stable
from .options import PerToken, check_options, option

__all__ = [
    "Method", "PerToken", "PrunedTokens", "ScoreMethod", "Selection", "VisualTokens", "option",
    "cosine_similarity", "gather_rows", "indices_of", "mask_of", "minmax", "normalise", "topk_stable",
]  # fmt: skip

Fidelity = Literal["exact", "unchecked", "stage-1", "input-probe", "control"]


@dataclass(eq=False)
class VisualTokens:
    """The N visual tokens of one image, or of a batch B of equal size (then every field has B in
    front).

    Signals are unscaled and higher means more. Which ones count is the method's business; the
    others are ignored.
    """

    features: Tensor  # (N, D): the rows that are returned
    saliency: Tensor | None = (
        None  # (N,): [CLS] attention or attention received, a late layer of the vision tower
    )
    relevance: Tensor | None = None  # (N,): similarity to the question
    metric: Tensor | None = (
        None  # (N, Dm): another space to measure distances in, such as before the projector
    )
    keys: Tensor | None = None  # (N, Dk): keys of the saliency layer
    cls_row: Tensor | None = None  # (D,): the [CLS] token, brought into the space of features
    shallow_saliency: Tensor | None = None  # (N,): saliency of an early layer
    received: Tensor | None = (
        None  # (N,): attention received, mean over heads and all queries with [CLS]; late layer
    )
    shallow_received: Tensor | None = None  # (N,): the same of an early layer
    attention: Tensor | None = None  # (N, N): head-mean attention map; row = query, column = key
    last_query: Tensor | None = None  # (C,): the [CLS] query of the tower's last block
    last_key: Tensor | None = (
        None  # (N, C), or (N + 1, C) with the [CLS] key first: keys of the tower's last block
    )
    text: Tensor | None = (
        None  # (T, Dt): embeddings of the question's tokens; may be shared by the batch
    )
    prototypes: Tensor | None = None  # (P, D): a codebook; may be shared by the batch
    grid: tuple[int, int] | None = None  # (h, w) with h * w = N
    frame_weights: Tensor | None = None  # (F,): importance of each of F equal runs of tokens
    probe: Tensor | None = None  # (N, ...): what the first decoder layers say about each token
    group: Tensor | None = (
        None  # (B,) integers: rows with the same id are scaled jointly (tiles of one image)
    )

    def require(self, name: str) -> Tensor:
        """The field `name`; ValueError if it was not given."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{name} is needed and was not given")
        return value


@dataclass(eq=False)
class PrunedTokens:
    """The K = min(budget, N) tokens kept, in the image's own order; batched (B in front) if the
    input was.
    """

    tokens: Tensor  # (K, D), dtype of features
    indices: Tensor  # (K,) int64, ascending, unique: the place of each kept token
    is_focus: Tensor  # (K,) bool: False only for FSR's scan anchors
    merged_into: (
        Tensor  # (N,) int64: index of the kept token that a discarded one was merged into, else -1
    )
    # () int64: FSR's literal K_F before clamping; of other methods, and of an unpruned image, K
    k_focus: Tensor
    num_focus: Tensor  # () int64
    num_scan: Tensor  # () int64
    num_merged: Tensor  # () int64


@dataclass(eq=False)
class Selection:
    """What a method decides for a batch: which K tokens, and what it did to their rows; None = the
    plain case.
    """

    indices: Tensor  # (B, K) int64, unique, in any order
    rows: Tensor | None = (
        None  # (B, K, D), in the order of indices: merged or pooled rows instead of the features
    )
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
    shallow_layer: ClassVar[int] = (
        0  # block of a 24-block tower, from 0, that its shallow_* signals are read at
    )
    servable: ClassVar[bool] = True  # whether a server can form what it needs, for some model
    query_aware: ClassVar[bool] = False  # whether the result can depend on the question
    paper: ClassVar[str] = ""
    license: ClassVar[str] = ""  # of the authors' published code
    fidelity: ClassVar[Fidelity] = "exact"

    def __post_init__(self) -> None:
        check_options(self)

    def required(self) -> tuple[str, ...]:
        """The fields that this instance cannot run without; more than `needs` where an option asks
        for one.
        """
        return self.needs

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        """Choose k of the N > k tokens of each image of the batch."""
        raise NotImplementedError

    def prune(self, tokens: VisualTokens, budget: int, *, validate: bool = True) -> PrunedTokens:
        """Keep exactly K = min(budget, N) tokens per image; K = N returns the features unchanged.

        ValueError for a wrong budget or shape and for a missing signal, always. NaN and Inf are
        looked for only with `validate`, since that waits for the device; without it nothing here
        does.
        """
        if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
            raise ValueError(f"budget must be an integer >= 1; got {budget!r}")
        batch = VisualTokens(**checked_fields(tokens, self.required(), self.uses, finite=validate))
        n = batch.features.shape[1]
        pruned = _keep_all(batch) if budget >= n else _assemble(batch, self.select(batch, budget))
        if tokens.features.dim() == 2:
            pruned = PrunedTokens(
                **{item.name: getattr(pruned, item.name)[0] for item in fields(pruned)}
            )
        return pruned


@dataclass
class ScoreMethod(Method):
    """A method that keeps the K tokens of highest score, ties to the lower index: override `score`."""

    def score(self, tokens: VisualTokens) -> Tensor:
        """One score per token, (B, N), higher = kept first."""
        raise NotImplementedError

    def select(self, tokens: VisualTokens, k: int) -> Selection:
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
    """Plain values where the method left them open: every token kept for its own sake, none merged."""
    (b, k), device = indices.shape, indices.device
    kept, none = (
        torch.full((b,), k, device=device),
        torch.zeros(b, dtype=torch.int64, device=device),
    )
    flags = torch.ones(b, k, dtype=torch.bool, device=device)
    return PrunedTokens(
        tokens=rows,
        indices=indices,
        is_focus=flags if chosen.is_focus is None else chosen.is_focus,
        merged_into=torch.full((b, n), -1, device=device)
        if chosen.merged_into is None
        else chosen.merged_into,
        k_focus=kept if chosen.k_focus is None else chosen.k_focus,
        num_focus=kept if chosen.num_focus is None else chosen.num_focus,
        num_scan=none if chosen.num_scan is None else chosen.num_scan,
        num_merged=none if chosen.num_merged is None else chosen.num_merged,
    )
