"""What the served FSR does otherwise than the paper: it scans by coverage and merges softly.

Ours, not the paper's (arXiv 2602.05809): farthest points chase outliers, and a focus that is cut
short spends its tokens on one thing again and again. Greedy coverage is facility location, a
monotone submodular function, so its value is within 1 - 1/e of the best (Nemhauser, Wolsey and
Fisher, 1978). docs/methods.md tells both variants side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fsr_vllm.kernels import coverage_greedy

from .base import gather_rows, mask_of

# Steps of a merge weight: whole numbers add up alike in every order, on every device.
_STEPS = 2.0**40


class Refined(NamedTuple):
    """What the refine stage made of the kept tokens of each image of a batch."""

    rows: Tensor  # (B, K, D), in the order of the indices given
    merged_into: Tensor  # (B, N) int64: the anchor's index, -1 for tokens not merged
    num_merged: Tensor  # (B,) int64: M


def coverage_weight(relevance: Tensor, mix: float, gamma: float) -> Tensor:
    """How much it counts that a token is covered: (1 - mix) / N + mix * r^gamma / sum of r^gamma.

    relevance (B, N), r scaled to [0, 1]; the answer (B, N) float32 adds up to 1. Where every r is 0
    (of one tile, scaled jointly with others) all tokens count alike.
    """
    n = relevance.shape[1]
    power = relevance.double().pow(gamma)
    total = power.sum(-1, keepdim=True)
    share = torch.where(total > 0, power / torch.where(total > 0, total, 1.0), 1.0 / n)
    return (share * mix + (1.0 - mix) / n).float()


def scan_coverage(similarity: Tensor, order: Tensor, num_focus: Tensor, weight: Tensor) -> Tensor:
    """K - |F| times the token that covers most of what F and the earlier picks leave uncovered.

    With c_i the best cosine of token i to a token of F or S, at least 0, token j adds sum over i of
    weight_i * max(0, cos_ij - c_i). similarity (B, N, N), order (B, K) and num_focus (B,) as in
    `fsr.scan`, but an empty F stays empty; weight (B, N). The answer (B, K) is F, then S in the
    order of picking.
    """
    k = order.shape[1]
    place = torch.arange(k, device=order.device)
    given = place < num_focus[:, None]
    # Tokens beyond F all write to a last column, which is cut off.
    n = similarity.shape[1]
    chosen = mask_of(torch.where(given, order, n), n + 1)[:, :n]
    picks = coverage_greedy(
        similarity, k - num_focus, row_weight=weight, selected=chosen, max_steps=k
    )
    return torch.where(given, order, picks.gather(1, (place - num_focus[:, None]).clamp(min=0)))


def nearest_anchor(similarity: Tensor, indices: Tensor, is_focus: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine to the nearest anchor, -inf where there is none, and its place among the K: (B, N).

    indices (B, K) ascending, so that ties go to the lower index; is_focus (B, K): False for
    anchors.
    """
    to_anchor = gather_rows(similarity, indices).masked_fill(is_focus[..., None], -torch.inf)
    return to_anchor.amax(1), to_anchor.argmax(1)


def merge_softly(
    features: Tensor, similarity: Tensor, indices: Tensor, is_focus: Tensor, temperature: float
) -> Refined:
    """Every discarded token is averaged into its nearest anchor, by how near it is.

    An anchor becomes the weighted mean of itself, of weight 1, and of the tokens that it is nearest
    to, of weight exp((cos - 1) / temperature) each. Focus tokens, and all where there is no anchor,
    stay as they are. features (B, N, D), similarity (B, N, N), indices and is_focus (B, K) as in
    `nearest_anchor`. Weights are rounded to 2^-40, rows are added in the order of their indices in
    float32 (of float64 features float64): the result is the same every time.
    """
    (b, k), n = indices.shape, similarity.shape[1]
    closeness, slot = nearest_anchor(similarity, indices, is_focus)
    own = torch.arange(k, device=indices.device).expand(b, k)
    # One bag of rows for each kept token, and a last one for tokens that go nowhere.
    bag = slot.where(closeness > -torch.inf, k).scatter(1, indices, own)
    weight = closeness.double().sub(1.0).div(temperature).exp().scatter(1, indices, 1.0)
    steps = weight.mul(_STEPS).round().long()
    total = steps.new_zeros(b, k + 1).scatter_add_(1, bag, steps).clamp_(min=1)
    share = steps.double() / total.gather(1, bag)

    members = bag.argsort(dim=-1, stable=True)  # bag by bag, ascending within each
    size = torch.zeros_like(total).scatter_add_(1, bag, torch.ones_like(bag)).view(-1)
    first = n * torch.arange(b, device=indices.device)[:, None]
    precise = features.to(torch.promote_types(features.dtype, torch.float32))
    rows = F.embedding_bag(
        (members + first).view(-1),
        precise.reshape(b * n, -1),
        size.cumsum(0) - size,
        mode="sum",
        per_sample_weights=share.gather(1, members).to(precise.dtype).view(-1),
    ).view(b, k + 1, -1)[:, :k]

    anchors = torch.cat([indices, torch.full_like(indices[:, :1], -1)], 1)
    merged_into = anchors.gather(1, bag).scatter(1, indices, -1)
    return Refined(rows, merged_into, (merged_into >= 0).sum(-1))
