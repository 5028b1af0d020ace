"""Focus-Scan-Refine: Tong, Bai, Zhu, Jiang, Liu, arXiv 2602.05809v2, equations (1)-(9).

Three pure functions in the paper's words, and the method composed of them. s of equation (1) and r
of (2) are inputs. What we serve instead of the paper's stages is in `fsr_coverage.py`; options say
whose they are.

What the paper leaves open, and how it is settled here:
- K_F > K: F is the K best by phi, and S is empty; nothing is merged then.
- K_F = 0 (every phi is 0, or rho is): the farthest-point scan starts with the token of highest phi,
  then highest saliency, then lowest index; that token counts as a scan anchor.
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
from typing import NamedTuple

import torch
from torch import Tensor

from fsr_vllm.kernels import farthest_from_prefix

from .base import (
    Method,
    Selection,
    VisualTokens,
    cosine_similarity,
    cosines_by_halves,
    gather_rows,
    minmax,
    option,
)
from .fsr_coverage import Refined, coverage_weight, merge_softly, nearest_anchor, scan_coverage


class Focus(NamedTuple):
    """What the focus stage found for each image of a batch."""

    saliency: Tensor  # (B, N) float32, s scaled to [0, 1]
    relevance: Tensor  # (B, N) float32, r scaled to [0, 1]; ones where there is none
    phi: Tensor  # (B, N) float32, equation (3)
    # (B, K) int64: pi, best first, of which the first num_focus are F; if F is empty, the
    # farthest-point scan starts at the first.
    order: Tensor
    k_focus: Tensor  # (B,) int64: K_F of equation (4), before clamping
    num_focus: Tensor  # (B,) int64: |F|


def focus(
    saliency: Tensor,
    relevance: Tensor | None,
    budget: int,
    *,
    alpha: float = 3.0,
    beta: float = 1.0,
    rho: float = 0.9,
    max_focus_share: float = 1.0,
    rule: str = "clamp",
    group: Tensor | None = None,
) -> Focus:
    """Equations (3), (4): the best by phi = r^alpha * s^beta, as many as hold rho of its sum.

    saliency, relevance (B, N) unscaled, N >= budget; group (B,) as in `minmax`. Without relevance
    r = 1. Where K_F is above max_focus_share * budget, rule "clamp" focuses on as many as that,
    but at least one, and "whole" on none.
    """
    s = minmax(saliency, group)
    r = torch.ones_like(s) if relevance is None else minmax(relevance, group)
    phi = r.pow(alpha) * s.pow(beta)
    ranked, order = phi.sort(dim=-1, descending=True, stable=True)
    mass = ranked.double().cumsum(-1)
    wanted = rho * mass[:, -1]
    k_focus = torch.where(wanted > 0, (mass < wanted[:, None]).sum(-1) + 1, 0)

    # The share 0.29 of 100 is 29, also in binary.
    most = math.floor(max_focus_share * budget + 1e-9)
    if rule == "whole":
        num_focus = k_focus.where(k_focus <= most, 0)
    else:
        num_focus = k_focus.clamp(max=max(1, most))
    order = order[:, :budget].contiguous()
    first = saliency.float().masked_fill(phi < ranked[:, :1], -torch.inf).argmax(-1)
    order[:, 0] = torch.where(num_focus > 0, order[:, 0], first)
    return Focus(s, r, phi, order, k_focus, num_focus)


def scan(similarity: Tensor, order: Tensor, num_focus: Tensor) -> Tensor:
    """Equation (5): step by step the token of largest min over A of (1 - cos), A those chosen.

    similarity (B, N, N) float32 cosines; order (B, K) and num_focus (B,) as in `Focus`: A starts as
    F, or as the first of order. The answer (B, K) is F, then S in the order of picking. With d the
    angle, or the chord sqrt(2 - 2 cos), every token is left within twice the best radius that any
    choice of as many tokens beside F could reach (equations (6), (7)); 1 - cos itself is no metric.
    """
    return farthest_from_prefix(similarity, order, num_focus.clamp(min=1), order.shape[1])


def refine(
    features: Tensor,
    similarity: Tensor,
    indices: Tensor,
    is_focus: Tensor,
    phi: Tensor,
    *,
    kappa: float = 1.0,
) -> Refined:
    """Equations (8), (9): the M discarded tokens nearest to a scan anchor are averaged into it.

    features (B, N, D); similarity (B, N, N); indices (B, K) of the kept tokens, ascending; is_focus
    (B, K), False for the anchors S; phi (B, N), the weights. M = min(floor(kappa * |S| + 0.5), N -
    K). The running average of (9) is the weighted mean of an anchor and all that goes into it, in
    whatever order, so it is taken at once.
    """
    n, (b, k), d = similarity.shape[1], indices.shape, features.shape[2]
    closeness, nearest = nearest_anchor(similarity, indices, is_focus)
    closeness = closeness.scatter(1, indices, -torch.inf)
    closest = closeness.sort(dim=-1, descending=True, stable=True).indices

    # The most that M can be, over all |S|: shapes must not depend on the data.
    most = math.floor(min(kappa * k + 0.5, n - k))
    merged = closest[:, :most]
    num_merged = ((~is_focus).sum(-1).double() * kappa + 0.5).floor().clamp(max=n - k).long()
    counts = torch.arange(most, device=indices.device) < num_merged[:, None]
    slot = nearest.gather(1, merged)
    merged_into = torch.full_like(closest, -1).scatter_(
        1, merged, indices.gather(1, slot).where(counts, -1)
    )

    own, incoming = phi.gather(1, indices), phi.gather(1, merged) * counts
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
    """Focus on what matters to the question, scan for what that leaves out, refine by merging.

    arXiv 2602.05809. The defaults are the paper's; where it is silent the option says so.
    """

    name = "fsr"
    needs = ("saliency",)
    uses = ("relevance", "group")
    query_aware = True
    paper = "arXiv 2602.05809"
    license = "none published"

    alpha: float = option(3.0, low=0, doc="exponent of relevance in phi; 0 leaves the question out")
    beta: float = option(1.0, low=0, doc="exponent of saliency in phi")
    rho: float = option(
        0.9, low=0, high=1, doc="share of the sum of phi that the focus tokens hold"
    )
    kappa: float = option(
        1.0, low=0, doc='discarded tokens merged per scan anchor, in refine="phi"'
    )
    max_focus_share: float = option(
        1.0, low=0, high=1, doc="most of K that focus takes (open in the paper)"
    )
    focus_rule: str = option(
        "clamp",
        choices=("clamp", "whole"),
        doc="where K_F is more: focus takes as many, at least one (paper), or none (ours)",
    )
    norm_scope: str = option(
        "row",
        choices=("row", "group"),
        doc="scores are scaled per row, or jointly over a group such as tiles (open in the paper)",
    )
    scan: str = option(
        "farthest",
        choices=("farthest", "coverage"),
        doc="by farthest points (paper), or by gain in coverage (ours)",
    )
    coverage_mix: float = option(
        0.6,
        low=0,
        high=1,
        doc='share of the weights that follows relevance, in scan="coverage" (ours)',
    )
    coverage_gamma: float = option(
        3.0, low=0, doc='exponent of relevance in that weight, in scan="coverage" (ours)'
    )
    refine: str = option(
        "phi",
        choices=("phi", "soft", "off"),
        doc="merge kappa tokens per anchor by phi (paper), or all by cosine (ours), or none (open)",
    )
    temperature: float = option(
        0.05, low=1e-3, doc='of the weights exp((cos - 1) / temperature), in refine="soft" (ours)'
    )

    def select(self, tokens: VisualTokens, k: int) -> Selection:
        found = focus(
            tokens.require("saliency"),
            tokens.relevance,
            k,
            alpha=self.alpha,
            beta=self.beta,
            rho=self.rho,
            max_focus_share=self.max_focus_share,
            rule=self.focus_rule,
            group=tokens.group if self.norm_scope == "group" else None,
        )
        features = tokens.features
        if features.device.type == "cpu":
            # Image by image: where focus takes all of K nothing need be compared.
            images = [Focus(*(value[b : b + 1] for value in found)) for b in range(len(features))]
            parts = [
                self._finish(features[b : b + 1], image, scans=bool(image.num_focus < k))
                for b, image in enumerate(images)
            ]
            indices, is_focus, *refined = (torch.cat(column) for column in zip(*parts, strict=True))
        else:
            indices, is_focus, *refined = self._finish(features, found, scans=True)
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

    def _finish(self, features: Tensor, found: Focus, scans: bool) -> tuple[Tensor, ...]:
        """Scan, if any image does, and refine: indices, is_focus, and the three of `Refined`."""
        picks = found.order
        if scans and self.scan == "coverage":
            similarity = cosines_by_halves(features)
            weight = coverage_weight(found.relevance, self.coverage_mix, self.coverage_gamma)
            picks = scan_coverage(similarity, picks, found.num_focus, weight)
        elif scans:
            similarity = cosine_similarity(features)
            picks = scan(similarity, picks, found.num_focus)
        indices, when = picks.sort(dim=-1)
        is_focus = when < found.num_focus[:, None]
        if not scans or self.refine == "off":
            unmerged = torch.full_like(found.phi, -1, dtype=torch.int64)
            none = torch.zeros_like(found.num_focus)
            return indices, is_focus, gather_rows(features, indices), unmerged, none
        kept = (features, similarity, indices, is_focus)
        if self.refine == "soft":
            return indices, is_focus, *merge_softly(*kept, self.temperature)
        return indices, is_focus, *refine(*kept, found.phi, kappa=self.kappa)
