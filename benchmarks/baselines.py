"""What the methods are measured against, as straightforward torch: no kernel and no helper of the
package.

`fsr_literal` is FSR as its equations read, one step and one image at a time. `cdpruner_steps` is
CDPruner written from its description: fast greedy MAP, batched over images, a handful of torch
operations per step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def similarity_gemm(units: Tensor) -> Tensor:
    """The product behind every cosine matrix, (B, N, D) -> (B, N, N), in the form in which the
    package does it.
    """
    if units.device.type == "cuda":
        return torch.bmm(units, units.mT)
    return (
        torch.stack([image @ image.mT for image in units])
        if len(units) > 1
        else (units[0] @ units[0].mT)[None]
    )


def unit_rows(features: Tensor) -> Tensor:
    """Rows of length 1 in float32."""
    return torch.nn.functional.normalize(features.float(), dim=-1)


def fsr_literal(
    features: Tensor,
    saliency: Tensor,
    relevance: Tensor,
    k: int,
    alpha: float = 3.0,
    beta: float = 1.0,
    rho: float = 0.9,
    kappa: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Rows (B, K, D) and ascending indices (B, K) of FSR (arXiv 2602.05809), equations (3) to (9)
    as they read.
    """
    images = [
        _literal_image(*image, k, alpha, beta, rho, kappa)
        for image in zip(features, saliency, relevance, strict=True)
    ]
    rows, indices = zip(*images, strict=True)
    return torch.stack(rows), torch.stack(indices)


def _literal_image(
    v: Tensor,
    saliency: Tensor,
    relevance: Tensor,
    k: int,
    alpha: float,
    beta: float,
    rho: float,
    kappa: float,
) -> tuple[Tensor, Tensor]:
    s = (saliency - saliency.min()) / (saliency.max() - saliency.min())
    r = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    phi = r**alpha * s**beta  # (3)
    ranked, order = phi.sort(descending=True, stable=True)
    k_focus = int((ranked.double().cumsum(0) < rho * ranked.double().sum()).sum()) + 1  # (4)
    focus = order[: min(k_focus, k)].tolist()

    unit = unit_rows(v)
    distance = 1 - unit @ unit.T
    chosen = list(focus)
    for _ in range(k - len(focus)):  # (5)
        nearest = distance[chosen].min(0).values
        nearest[chosen] = -torch.inf
        chosen.append(int(nearest.argmax()))

    rows, weight = v.float().clone(), phi.clone()
    anchors = torch.tensor(chosen[len(focus) :], device=v.device)
    if len(anchors):
        to_anchor, which = distance[anchors].min(0)  # (8)
        to_anchor[chosen] = torch.inf
        merges = min(int(kappa * len(anchors) + 0.5), len(v) - k)
        for i in to_anchor.sort(stable=True).indices[:merges].tolist():  # (9)
            a = anchors[which[i]]
            total = weight[a] + phi[i]
            if total > 0:
                rows[a] = (weight[a] * rows[a] + phi[i] * v[i]) / total
            weight[a] = total
    indices = torch.tensor(sorted(chosen), device=v.device)
    return rows[indices].to(v.dtype), indices


def cdpruner_steps(features: Tensor, relevance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows (B, K, D) and ascending indices (B, K) of CDPruner (arXiv 2506.10967), each image scaled
    by itself.
    """
    b, n, _ = features.shape
    low, high = relevance.amin(-1, keepdim=True), relevance.amax(-1, keepdim=True)
    quality = (relevance - low + 1e-6) / (high - low)
    unit = unit_rows(features)
    kernel = quality[:, :, None] * torch.bmm(unit, unit.mT) * quality[:, None, :]

    image = torch.arange(b, device=features.device)
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    factor = torch.zeros(b, k, n, device=features.device)
    picks = torch.empty(b, k, dtype=torch.int64, device=features.device)
    for t in range(k):
        j = gain.argmax(-1)
        picks[:, t] = j
        known = torch.einsum("bs,bsn->bn", factor[image, :t, j], factor[:, :t])
        factor[:, t] = (kernel[image, j] - known) / gain[image, j].sqrt()[:, None]
        gain = gain - factor[:, t].square()
        gain[image, j] = -torch.inf
    indices = picks.sort(dim=-1).values
    return features.gather(1, indices[..., None].expand(-1, -1, features.shape[-1])), indices
