"""Small tensor helpers that methods share; pure torch, batched, and without any wait for the
device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def minmax(x: Tensor, group: Tensor | None = None) -> Tensor:
    """Scale each row of x (B, N) to [0, 1] in float32; a constant row becomes ones.

    Rows with the same id in `group` (B,) share one minimum and one maximum (tiles of one image).
    """
    x = x.float().contiguous()
    low, high = x.amin(-1), x.amax(-1)
    if group is not None:
        same = group[:, None] == group[None, :]
        low = torch.where(same, low, torch.inf).amin(-1)
        high = torch.where(same, high, -torch.inf).amax(-1)
    low, span = low[:, None], (high - low)[:, None]
    return torch.where(span > 0, (x - low) / torch.where(span > 0, span, 1.0), 1.0)


def topk_stable(score: Tensor, k: int) -> Tensor:
    """Places (B, k) of the k highest scores of each row (B, N), best first, ties to the lower
    index.

    torch.topk promises nothing about ties; a stable sort does.
    """
    return torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :k]


def best_mask(score: Tensor, k: int) -> Tensor:
    """Which of the last dimension are its k highest scores, ties to the lower index; cheaper than a
    stable sort.
    """
    if k == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    least = score.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = score > least, score == least
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def normalise(x: Tensor) -> Tensor:
    """Rows of x (..., D) in float32 and of length 1; a zero row stays zero."""
    x = x.float()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1.0)


def cosine_similarity(x: Tensor) -> Tensor:
    """Cosine of every pair of rows: (B, N, D) -> (B, N, N) float32 in [-1, 1]; a zero row has
    cosine 0 with all.

    Equal rows have cosine 1 exactly: above 1 - 1e-6, where float32 no longer tells rows apart,
    every cosine is 1.
    """
    if x.device.type == "cpu":
        # One product per image: a batched product may round differently, and then a batch would not
        # equal its images.
        units = [normalise(image) for image in x]
        similarity = (
            torch.stack([unit @ unit.mT for unit in units])
            if len(units) > 1
            else units[0] @ units[0].mT
        )
        similarity = similarity.view(len(units), *similarity.shape[-2:])
    else:
        unit = normalise(x)
        similarity = torch.bmm(unit, unit.mT)
    # All that is below -1 + 1e-6 becomes -1, with the sign turned: a tenth of the time of a mask.
    return torch.threshold_(similarity.neg_(), -1.0 + 1e-6, -1.0).neg_().clamp_(min=-1.0)


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of x (B, N, D) at indices (B, K): (B, K, D)."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


def mask_of(indices: Tensor, n: int) -> Tensor:
    """Boolean (B, n), True at indices (B, K)."""
    return torch.zeros(indices.shape[0], n, dtype=torch.bool, device=indices.device).scatter_(
        1, indices, True
    )


def indices_of(mask: Tensor, k: int) -> Tensor:
    """Ascending places (B, k) of the True entries of mask (B, N), of which every row has exactly k."""
    return topk_stable(mask.to(torch.uint8), k)


def square_grid(n: int) -> tuple[int, int]:
    """(side, side) if n is a square number, else one row (1, n)."""
    side = round(n**0.5)
    return (side, side) if side * side == n else (1, n)


def regions(k: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    """Cut the grid (h, w) into exactly k rectangles of nearly equal size; the rectangle (N,) each
    token lies in.

    The rectangles form bands of rows, and each band is cut into nearly the same number of columns.
    """
    h, w = grid
    bands = _band_count(k, grid)
    token = torch.arange(h * w, device=device)
    band = ((token // w + 1) * bands - 1) // h
    first = band * k // bands
    columns = (band + 1) * k // bands - first
    return first + ((token % w + 1) * columns - 1) // w


def region_bounds(
    k: int, grid: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, bottom, left and right, (k,) each, of every rectangle of `regions`; bottom and right are
    excluded.
    """
    h, w = grid
    bands = _band_count(k, grid)
    region = torch.arange(k, device=device)
    band = ((region + 1) * bands - 1) // k
    first = band * k // bands
    columns = (band + 1) * k // bands - first
    column = region - first
    return (
        band * h // bands,
        (band + 1) * h // bands,
        column * w // columns,
        (column + 1) * w // columns,
    )


def _band_count(k: int, grid: tuple[int, int]) -> int:
    """As many bands of rows as make the k rectangles nearly square, with at most h bands and w
    columns in each.
    """
    h, w = grid
    return min(max(round((k * h / w) ** 0.5), -(-k // w)), h, k)
