"""Small tensor helpers that methods share: batched, and without any wait for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def each_image(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """The function's answers for one image after the other, as a batch.

    For products: a batched one may round differently, and then a batch would not equal its images.
    """
    found = [function(*image) for image in zip(*batches, strict=True)]
    return torch.stack(found) if len(found) > 1 else found[0][None]


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
    """Places (B, k) of the k highest scores of each row (B, N), best first.

    Ties go to the lower index: a stable sort promises that, torch.topk does not.
    """
    return torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :k]


def best_mask(score: Tensor, k: int) -> Tensor:
    """Which are the k highest of the last dimension, ties to the lower; cheaper than a sort."""
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
    """Cosine of every pair of rows: (B, N, D) -> (B, N, N) float32 in [-1, 1].

    A zero row has cosine 0 with all. Equal rows have cosine 1 exactly: above 1 - 1e-6, where
    float32 no longer tells rows apart, every cosine is 1.
    """
    unit = normalise(x)
    on_cpu = x.device.type == "cpu"
    similarity = each_image(_products, unit) if on_cpu else torch.bmm(unit, unit.mT)
    # All that is below -1 + 1e-6 becomes -1, with the sign turned: a tenth of the time of a mask.
    return torch.threshold_(similarity.neg_(), -1.0 + 1e-6, -1.0).neg_().clamp_(min=-1.0)


def cosines_by_halves(x: Tensor) -> Tensor:
    """`cosine_similarity` up to rounding, at three quarters of its time on a CPU: a pair once.

    Rows are multiplied as they are and the products divided by lengths, which reads N x N instead
    of N x D; of the matrix only strips from the diagonal down are multiplied, the rest is copied.
    Lengths and products must be finite in float32. Elsewhere it is `cosine_similarity`.
    """
    if x.device.type != "cpu":
        return cosine_similarity(x)
    similarity = each_image(_strips, x.float())
    return torch.threshold_(similarity.neg_(), -1.0 + 1e-6, -1.0).neg_().clamp_(min=-1.0)


_STRIP = 192  # columns: as many as a product needs to be fast


def _strips(rows: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(rows, dim=-1)
    inverse = torch.where(length > 0, length, torch.inf).reciprocal()
    n = len(rows)
    cosines = rows.new_empty(n, n)
    for start in range(0, n, _STRIP):
        end = min(start + _STRIP, n)
        strip = cosines[start:, start:end]
        torch.mm(rows[start:], rows[start:end].mT, out=strip)
        strip.mul_(inverse[start:, None]).mul_(inverse[start:end])
        cosines[start:end, end:] = cosines[end:, start:end].mT
    return cosines


def _products(rows: Tensor) -> Tensor:
    return rows @ rows.mT


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of x (B, N, D) at indices (B, K): (B, K, D)."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


def mask_of(indices: Tensor, n: int) -> Tensor:
    """Boolean (B, n), True at indices (B, K)."""
    nothing = torch.zeros(indices.shape[0], n, dtype=torch.bool, device=indices.device)
    return nothing.scatter_(1, indices, True)


def indices_of(mask: Tensor, k: int) -> Tensor:
    """Ascending places (B, k) of the True entries of mask (B, N), k of them in every row."""
    return topk_stable(mask.to(torch.uint8), k)


def square_grid(n: int) -> tuple[int, int]:
    """(side, side) if n is a square number, else one row (1, n)."""
    side = round(n**0.5)
    return (side, side) if side * side == n else (1, n)


def regions(k: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    """The rectangle (N,) each token lies in, of exactly k of nearly equal size that fill the grid.

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
    """Top, bottom, left, right, (k,) each, of the rectangles of `regions`; ends are excluded."""
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
    """As many bands as make rectangles nearly square, at most h, with at most w columns each."""
    h, w = grid
    return min(max(round((k * h / w) ** 0.5), -(-k // w)), h, k)
