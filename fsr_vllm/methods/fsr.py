"""Focus-Scan-Refine: Tong, Bai, Zhu, Jiang, Liu, arXiv 2602.05809v2, equations (1)-(9).

Three pure functions in the paper's words, and the method composed of them. s of equation (1) and r
of (2) are inputs.
What the paper leaves open, and how it is settled here:
- K_F > K: F is the K best by phi, and S is empty; nothing is merged then. K_F = 0 (every phi is 0):
  the scan starts
  with the token of highest phi, then highest saliency, then lowest index; that token counts as a
  scan anchor.
- Every tie goes to the lower index. A constant map scales to ones. A missing relevance is r = 1.
- An anchor whose own and incoming weights sum to 0 stays as it is; the tokens assigned to it still
  count as merged.
- Fewer discarded tokens than kappa * |S|: all of them are merged.
Scores, distances and sums of rows are float32 (of float64 features float64); phi is summed in
float64 to find K_F.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fsr_vllm.kernels import coverage_greedy, farthest_from_prefix

from .base import Method, Selection, VisualTokens, cosine_similarity, gather_rows, minmax, option


class Focus(NamedTuple):
    """What the focus stage found for each image of a batch."""

    saliency: Tensor  # (B, N) float32, s scaled to [0, 1]
    relevance: Tensor  # (B, N) float32, r scaled to [0, 1]; ones where there is none
    phi: Tensor  # (B, N) float32, equation (3)
    # (B, K) int64: pi, best first; the first num_focus are F; if F is empty the scan starts at the
    # first
    order: Tensor
    k_focus: Tensor  # (B,) int64: K_F of equation (4), before clamping
    num_focus: Tensor  # (B,) int64: |F|


class Refined(NamedTuple):
    """What the refine stage made of the kept tokens of each image of a batch."""

    rows: Tensor  # (B, K, D), in the order of the indices given
    merged_into: Tensor  # (B, N) int64: the anchor's index, -1 for tokens not merged
    num_merged: Tensor  # (B,) int64: M


def focus(
    saliency: Tensor,
    relevance: Tensor | None,
    budget: int,
    *,
    alpha: float = 3.0,
    beta: float = 1.0,
    rho: float = 0.9,
    focus_scope: str = "all",
    max_focus_share: float = 1.0,
    group: Tensor | None = None,
) -> Focus:
    """Equations (3), (4): the best tokens by phi = r^alpha * s^beta, as many as hold the share rho
    of its sum.

    saliency, relevance (B, N) unscaled, N >= budget; group (B,) as in `minmax`. Without relevance r
    = 1.
    """
    s = minmax(saliency, group)
    r = torch.ones_like(s) if relevance is None else minmax(relevance, group)
    phi = r.pow(alpha) * s.pow(beta)
    ranked, order = phi.sort(dim=-1, descending=True, stable=True)
    mass = ranked.double().cumsum(-1)
    wanted = rho * mass[:, -1 if focus_scope == "all" else budget - 1]
    k_focus = torch.where(wanted > 0, (mass < wanted[:, None]).sum(-1) + 1, 0)

    most = max(
        1, math.floor(max_focus_share * budget + 1e-9)
    )  # the share 0.29 of 100 is 29, also in binary
    num_focus = k_focus.clamp(max=min(budget, most))
    order = order[:, :budget].contiguous()
    first = saliency.float().masked_fill(phi < ranked[:, :1], -torch.inf).argmax(-1)
    order[:, 0] = torch.where(num_focus > 0, order[:, 0], first)
    return Focus(s, r, phi, order, k_focus, num_focus)


def scan(
    similarity: Tensor,
    order: Tensor,
    num_focus: Tensor,
    rule: str = "farthest",
    weight: Tensor | None = None,
) -> Tensor:
    """Equation (5): round by round the token that A, the tokens chosen so far, accounts for least;
    F, then S: (B, K).

    similarity (B, N, N) float32 cosines; order (B, K) and num_focus (B,) as in `Focus`: A starts as
    F, or as the first of order. Rules: "farthest" takes the largest min over A of (1 - cos),
    "saliency" and "relevance" the largest weight times that, "coverage" the largest sum over i of
    weight_i * max(0, cos_ij - c_i) with c_i = max(0, max over A of cos_i). weight (B, N) float32,
    None = ones. The picks come in the order in which they were made. With d the angle, or the chord
    sqrt(2 - 2 cos), "farthest" leaves every token within twice the best radius that any choice of
    as many tokens beside F could reach (equations (6), (7)); 1 - cos itself is no metric.
    """
    k, start = order.shape[1], num_focus.clamp(min=1)
    if rule != "coverage":
        return farthest_from_prefix(similarity, order, start, k, weight)
    place = torch.arange(k, device=order.device)
    given = place < start[:, None]
    chosen = torch.zeros(similarity.shape[:2], dtype=torch.int32, device=order.device)
    chosen = chosen.scatter_add_(1, order, given.int()) > 0
    picks = coverage_greedy(
        similarity, k - start, row_weight=weight, selected=chosen, max_steps=k - 1
    )
    picks = torch.cat([picks, order[:, :1]], 1)  # so that there is a column to read at K = 1
    return torch.where(given, order, picks.gather(1, (place - start[:, None]).clamp(min=0)))


def refine(
    features: Tensor,
    similarity: Tensor,
    indices: Tensor,
    is_focus: Tensor,
    phi: Tensor,
    *,
    kappa: float = 1.0,
    weighting: str = "phi",
    weight_floor: float = 0.0,
) -> Refined:
    """Equations (8), (9): the M discarded tokens most similar to their nearest scan anchor are
    averaged into it.

    features (B, N, D); similarity (B, N, N); indices (B, K) of the kept tokens, ascending; is_focus
    (B, K), False for the anchors S; phi (B, N), the weights. M = min(floor(kappa * |S| + 0.5), N -
    K). The running average of (9) is the weighted mean of an anchor and all that goes into it, in
    whatever order, so it is taken at once.
    """
    n, (b, k), d = similarity.shape[1], indices.shape, features.shape[2]
    to_anchor = gather_rows(similarity, indices).masked_fill(is_focus[..., None], -torch.inf)
    closeness = to_anchor.amax(1).scatter(1, indices, -torch.inf)
    closest = closeness.sort(dim=-1, descending=True, stable=True).indices

    most = math.floor(
        min(kappa * k + 0.5, n - k)
    )  # of M, over all |S|: the shapes must not depend on the data
    merged = closest[:, :most]
    num_merged = ((~is_focus).sum(-1).double() * kappa + 0.5).floor().clamp(max=n - k).long()
    counts = torch.arange(most, device=indices.device) < num_merged[:, None]
    slot = to_anchor.argmax(1).gather(1, merged)
    merged_into = torch.full_like(closest, -1).scatter_(
        1, merged, indices.gather(1, slot).where(counts, -1)
    )

    weight = phi.clamp(min=weight_floor) if weighting == "phi" else torch.ones_like(phi)
    own, incoming = weight.gather(1, indices), weight.gather(1, merged) * counts
    total = own.scatter_add(1, slot, incoming)
    some = torch.where(total > 0, total, 1.0)
    # Shares first, rows after: tiny weights keep their ratio, and the share 1 of an unmerged row
    # leaves its bits alone.
    own, incoming = torch.where(total > 0, own / some, 1.0), incoming / some.gather(1, slot)
    precise = torch.promote_types(features.dtype, torch.float32)
    rows = (gather_rows(features, indices).to(precise) * own[..., None]).view(b * k, d)
    added = (gather_rows(features, merged).to(precise) * incoming[..., None]).view(-1, d)
    place = (slot + k * torch.arange(b, device=slot.device)[:, None]).view(-1)
    return Refined(rows.index_add_(0, place, added).view(b, k, d), merged_into, num_merged)


@dataclass
class FSR(Method):
    """Focus on what matters to the question, scan for what that leaves out, refine the scan's
    anchors by merging.

    arXiv 2602.05809. The defaults are the paper's; where it is silent the option says so.
    """

    name: ClassVar[str] = "fsr"
    needs: ClassVar[tuple[str, ...]] = ("saliency",)
    uses: ClassVar[tuple[str, ...]] = ("relevance", "metric", "group")
    query_aware: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2602.05809"
    license: ClassVar[str] = "none published"

    alpha: float = option(3.0, low=0, doc="exponent of relevance in phi; 0 leaves the question out")
    beta: float = option(1.0, low=0, doc="exponent of saliency in phi")
    rho: float = option(
        0.9, low=0, high=1, doc="share of the sum of phi that the focus tokens hold"
    )
    kappa: float = option(1.0, low=0, doc="discarded tokens merged per scan anchor")
    focus_scope: str = option(
        "all",
        choices=("all", "topk"),
        doc="whose sum rho is a share of: all tokens', or the K best's (open)",
    )
    max_focus_share: float = option(
        1.0, low=0, high=1, doc="most of K that focus takes, but at least one token (open)"
    )
    norm_scope: str = option(
        "row",
        choices=("row", "group"),
        doc="scores are scaled per row, or jointly over a group such as tiles (open)",
    )
    scan: str = option(
        "farthest",
        choices=("farthest", "saliency", "relevance", "coverage"),
        doc="paper's rule, that times saliency or relevance, coverage gain",
    )
    scan_gamma: float = option(
        1.0, low=0, doc='exponent of the map in scan="saliency" and scan="relevance"'
    )
    coverage_weight: str = option(
        "phi",
        choices=("phi", "saliency", "relevance", "uniform"),
        doc='how much a covered token counts in scan="coverage"',
    )
    refine: str = option(
        "phi", choices=("phi", "uniform", "off"), doc="weights of merging, or no merging"
    )
    weight_floor: float = option(
        0.0, low=0, doc='least weight in refine="phi" (open: phi can be 0)'
    )
    space: str = option(
        "features", choices=("features", "metric"), doc="where cosines are measured (open)"
    )

    def required(self) -> tuple[str, ...]:
        return (*self.needs, "metric") if self.space == "metric" else self.needs

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        found = focus(
            tokens.require("saliency"),
            tokens.relevance,
            k,
            alpha=self.alpha,
            beta=self.beta,
            rho=self.rho,
            focus_scope=self.focus_scope,
            max_focus_share=self.max_focus_share,
            group=tokens.group if self.norm_scope == "group" else None,
        )
        features, space = tokens.features, tokens.require(self.space)
        if features.device.type == "cpu":
            # Image by image: where focus takes all of K nothing need be compared.
            parts = []
            for b, num_focus in enumerate(found.num_focus.tolist()):
                own = slice(b, b + 1)
                image = Focus(*(value[own] for value in found))
                parts.append(self._finish(features[own], space[own], image, scans=num_focus < k))
            indices, is_focus, *refined = (torch.cat(column) for column in zip(*parts, strict=True))
        else:
            indices, is_focus, *refined = self._finish(features, space, found, scans=True)
        rows, merged_into, num_merged = refined
        return Selection(
            indices,
            rows=rows,
            is_focus=is_focus,
            merged_into=merged_into,
            k_focus=found.k_focus,
            num_focus=found.num_focus,
            num_scan=k - found.num_focus,
            num_merged=num_merged,
        )

    def _finish(
        self, features: Tensor, space: Tensor, found: Focus, scans: bool
    ) -> tuple[Tensor, ...]:
        """Scan, if any image does, and refine: indices, is_focus, and the three of `Refined`."""
        picks = found.order
        if scans:
            similarity = cosine_similarity(space)
            kind = self.coverage_weight if self.scan == "coverage" else self.scan
            maps = {"saliency": found.saliency, "relevance": found.relevance, "phi": found.phi}
            weight = maps.get(kind)
            if weight is not None and self.scan != "coverage":
                weight = weight.pow(self.scan_gamma)
            picks = scan(similarity, picks, found.num_focus, self.scan, weight)
        indices, when = picks.sort(dim=-1)
        is_focus = when < found.num_focus[:, None]
        if scans and self.refine != "off":
            how = {"kappa": self.kappa, "weight_floor": self.weight_floor}
            refined = refine(
                features, similarity, indices, is_focus, found.phi, weighting=self.refine, **how
            )
            return indices, is_focus, *refined
        unmerged = torch.full_like(found.phi, -1, dtype=torch.int64)
        return (
            indices,
            is_focus,
            gather_rows(features, indices),
            unmerged,
            torch.zeros_like(found.num_focus),
        )
