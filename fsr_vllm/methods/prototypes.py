"""The codebook of method "codebook": what goes into it, how it is built, saved and loaded.

Calibration needs the language model and takes hours on a GPU, so what it measures comes from the
caller: for every visual token its largest next-token probability when it is fed alone, and how far
the answer moves when it is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .ops import normalise, topk_stable

_KEY = "prototypes"
_BLOCK = 1024  # rows of distances held at a time


def redundant_tokens(
    top_probability: Tensor,
    context_divergence: Tensor,
    global_divergence: Tensor,
    *,
    max_probability: float = 0.15,
    max_divergence: float = 2e-3,
    context_weight: float = 1.0,
    global_weight: float = 16.0,
) -> Tensor:
    """Which tokens (N,) say little alone and are not missed: a mask.

    Divergences are Jensen-Shannon, of the output with and without the token's group. The defaults
    are those published for LLaVA-1.5; others are max_probability 0.10 or 0.08 and, for
    LLaVA-OneVision, max_divergence 1.8e-3. That both tests must be passed, and that the two
    divergences are added, is our reading.
    """
    moved = context_weight * context_divergence + global_weight * global_divergence
    return (top_probability < max_probability) & (moved < max_divergence)


def build_prototypes(
    images: Iterable[Tensor],
    *,
    clusters_per_image: int = 8,
    min_tokens: int = 2,
    clusters: int = 64,
    min_images: int = 64,
    neighbours: int = 5,
) -> Tensor:
    """Prototypes (P, D) from the redundant rows (n, D) of each calibration image.

    They are float32 and of length 1. Each image's rows are clustered (DPC-kNN), clusters of fewer
    than min_tokens are dropped, and the means of the others are clustered over all images; the mean
    of every cluster that draws on at least min_images images is a prototype. Clusters and images
    are 24 and 16 for LLaVA-OneVision. The published files hold more prototypes than clusters (454
    for LLaVA-1.5-7B), so their last step is unlike ours: raise `clusters` for a larger codebook.
    Open, and settled here: min_tokens, neighbours, and distances between rows of length 1, since
    scoring is by cosine. ValueError if no cluster is left.
    """
    means, owner = [], []
    for number, rows in enumerate(images):
        if not len(rows):
            continue
        unit = normalise(rows)
        labels = dpc_knn(unit, clusters_per_image, neighbours)
        found = [
            unit[labels == label].mean(0)
            for label in labels.unique()
            if (labels == label).sum() >= min_tokens
        ]
        means += found
        owner += [number] * len(found)
    prototypes = []
    if means:
        points, images_of = normalise(torch.stack(means)), torch.tensor(owner)
        labels = dpc_knn(points, clusters, neighbours).cpu()
        for label in labels.unique():
            if len(images_of[labels == label].unique()) >= min_images:
                prototypes.append(points[(labels == label).to(points.device)].mean(0))
    if not prototypes:
        raise ValueError(
            f"no cluster draws on min_images = {min_images} images: give more images or lower it"
        )
    return normalise(torch.stack(prototypes))


def dpc_knn(points: Tensor, clusters: int, neighbours: int = 5) -> Tensor:
    """Density-peak clustering by nearest neighbours: the cluster (N,) of each of points (N, D).

    Density is exp(-mean squared distance to the nearest neighbours). The centres are the points of
    highest density times distance to the nearest denser point, for the densest the largest
    distance; the others join the nearest centre. Ties go to the lower index.
    """
    n = len(points)
    blocks = torch.arange(n, device=points.device).split(_BLOCK)
    near = min(neighbours, n - 1) + 1  # the point itself, at distance 0, is the first
    squares = [
        torch.cdist(points[block], points).square().topk(near, largest=False).values
        for block in blocks
    ]
    density = torch.exp(-torch.cat(squares).sum(-1) / max(1, near - 1))
    rank = topk_stable(density, n).argsort()
    gaps = []
    for block in blocks:
        distance = torch.cdist(points[block], points)
        denser = distance.masked_fill(rank >= rank[block, None], torch.inf).amin(-1)
        gaps.append(torch.where(rank[block] == 0, distance.amax(-1), denser))
    centres = topk_stable(density * torch.cat(gaps), min(clusters, n))
    labels = torch.cat([torch.cdist(points[block], points[centres]).argmin(-1) for block in blocks])
    return labels.scatter(0, centres, torch.arange(len(centres), device=points.device))


def save_prototypes(prototypes: Tensor, path: str | Path) -> None:
    """Write prototypes (P, D) to a .pt or .safetensors file."""
    tensors = {_KEY: _checked(prototypes).detach().cpu().contiguous()}
    if _format(path) == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def load_prototypes(path: str | Path) -> Tensor:
    """Prototypes (P, D) of a .pt or .safetensors file.

    It holds a tensor, or a dictionary with "prototypes" or with one tensor. ValueError for anything
    else. A .pt file is read as weights only: no code in it is run.
    """
    if _format(path) == ".safetensors":
        from safetensors.torch import load_file

        found: object = load_file(path)
    else:
        found = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, dict):
        found = found.get(_KEY, next(iter(found.values())) if len(found) == 1 else None)
    return _checked(found)


def _format(path: str | Path) -> str:
    suffix = Path(path).suffix
    if suffix not in (".pt", ".pth", ".safetensors"):
        raise ValueError(f"prototypes are kept in .pt or .safetensors files; got {str(path)!r}")
    return suffix


def _checked(prototypes: object) -> Tensor:
    if (
        not isinstance(prototypes, Tensor)
        or prototypes.dim() != 2
        or not prototypes.is_floating_point()
    ):
        raise ValueError("prototypes must be one floating-point tensor of shape (P, D)")
    return prototypes
