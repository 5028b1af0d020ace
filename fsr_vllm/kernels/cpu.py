"""The three greedy loops for CPUs: numpy views of the same memory, one image after the other.

A step touches a few vectors of N floats, so the cost of a call matters more than its arithmetic:
numpy's is about a quarter of torch's. Nothing is allocated inside a loop except where a step
gathers rows. Parameters as in `dispatch.py`.
"""

from __future__ import annotations

import numpy as np
import torch

from .grid import SHIFT

# Rows worked on at a time: at N = 2880 a block is 0.7 MB and stays in a core's second-level cache.
_BLOCK = 64
# Entries of such a block that is widened to float64 as well.
_ENTRIES = 2**16


def _view(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.numpy()


def farthest(
    similarity: torch.Tensor, prefix: torch.Tensor, count: torch.Tensor, budget: int
) -> torch.Tensor:
    """Farthest-point rounds with a running minimum of distances: one row is read per step."""
    batch, tokens, _ = similarity.shape
    picks = np.empty((batch, budget), np.int64)
    rows = similarity.numpy()
    distance = np.empty(tokens, np.float32)
    for b, chosen in enumerate(count.tolist()):
        sim, start = rows[b], prefix[b, :chosen].numpy()
        picks[b, :chosen] = start
        # 1 - x rounds monotonically, so the smallest distance is exactly 1 - the largest
        # similarity.
        nearest = np.subtract(1.0, sim[start].max(0))
        nearest[start] = -np.inf  # a chosen token stays at -inf under minimum
        for t in range(chosen, budget):
            picks[b, t] = j = int(nearest.argmax())
            np.subtract(1.0, sim[j], out=distance)
            np.minimum(nearest, distance, out=nearest)
            nearest[j] = -np.inf
    return torch.from_numpy(picks)


def dpp(kernel: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    """Fast greedy MAP of a determinantal point process, by incremental Cholesky rows."""
    batch, tokens, _ = kernel.shape
    picks = np.empty((batch, steps), np.int64)
    rows = kernel.numpy()
    factor = np.empty((steps, tokens), np.float32)
    block = np.empty((_BLOCK + 1, tokens), np.float32)
    # Contiguous on purpose: numpy adds the rows of a C-ordered array one after the other, which is
    # the order of all backends that agree bit for bit.
    explained = np.empty(tokens, np.float32)
    threshold, one = np.float32(eps), np.float32(1)
    for b in range(batch):
        variance = rows[b].diagonal().copy()
        for t in range(steps):
            j = int(variance.argmax())
            picks[b, t] = j
            best = variance[j]
            if best <= threshold:
                variance[j] = -np.inf  # from here on only rounding noise is left
                continue
            explained.fill(0.0)
            for s in range(0, t, _BLOCK):
                size = min(_BLOCK, t - s)
                block[0] = explained  # carries the sum over: its order is that of one long sum
                np.multiply(
                    factor[s : s + size], factor[s : s + size, j, None], out=block[1 : size + 1]
                )
                np.add.reduce(block[: size + 1], axis=0, out=explained)
            row = factor[t]
            np.subtract(rows[b, j], explained, out=row)
            np.multiply(row, one / np.sqrt(best), out=row)
            np.multiply(row, row, out=explained)
            np.subtract(variance, explained, out=variance)
            variance[j] = -np.inf
    return torch.from_numpy(picks)


class _Gains:
    """Gain of every candidate, kept up to date from the tokens whose cover rose.

    A token i whose cover rises from lo to hi lowers gain_j by w_i (clip(S_ij, lo, hi) - lo). As
    sums are exact (`grid.py`), updating is recomputing, at about 5 N rows read in all instead of K
    N. sim (N, N) float32; weight (N,) float64, or None; cover (N,) float32. Similarities and covers
    are worked on shifted by SHIFT, where adding rounds to the grid and differences are those of the
    unshifted values.
    """

    def __init__(self, sim: np.ndarray, weight: np.ndarray | None, cover: np.ndarray):
        self.sim, self.weight, self.cover = sim, weight, cover
        self.most = min(len(sim), max(8, _ENTRIES // len(sim)))
        size = self.most, len(sim)
        self.block, self.wide = np.empty(size, np.float32), np.empty(size)
        self.values = np.zeros(len(sim))
        for start in range(0, len(sim), self.most):
            part = slice(start, start + self.most)
            x = np.add(sim[part], SHIFT, out=self.block[: len(sim[part])])
            np.maximum(x, cover[part, None], out=x)
            self.values += self._sum(x, cover[part], part)

    def rise(self, pick: int) -> None:
        """The cover rises to the row of `pick` wherever that is higher."""
        row = self.sim[pick] + np.float32(SHIFT)
        risen = (row > self.cover).nonzero()[0]
        for start in range(0, len(risen), self.most):
            index = risen[start : start + self.most]
            low, high = self.cover[index], row[index]
            x = self.block[: len(index)]
            self.sim.take(index, 0, x, "clip")  # the other modes copy once more
            np.add(x, SHIFT, out=x)
            np.maximum(x, low[:, None], out=x)
            np.minimum(x, high[:, None], out=x)
            self.values -= self._sum(x, low, index)
            self.cover[index] = high

    def _sum(self, x: np.ndarray, low: np.ndarray, tokens: np.ndarray | slice) -> np.ndarray:
        """Sum over these tokens, the rows of x, of weight * (x - low).

        Not a matrix product: its threads would fight with those of the server for these few
        thousand additions. einsum multiplies and adds in one pass; of mixed types it would take
        several times as long, so x is widened first.
        """
        if self.weight is None:
            total = x.sum(0, dtype=np.float64)
            total -= low.sum(dtype=np.float64)
            return total
        wide, weight = self.wide[: len(x)], self.weight[tokens]
        np.copyto(wide, x)
        total = np.einsum("i,ij->j", weight, wide)
        total -= weight.dot(low)
        return total


def coverage(
    similarity: torch.Tensor,
    prefix: torch.Tensor,
    count: torch.Tensor,
    steps: torch.Tensor,
    row_weight: torch.Tensor | None,
    candidate_weight: torch.Tensor | None,
    candidate_bonus: torch.Tensor | None,
    width: int,
) -> torch.Tensor:
    """Coverage rounds; gains are updated from the tokens whose cover rose."""
    batch, tokens, _ = similarity.shape
    picks = np.full((batch, width), -1, np.int64)
    sims, row_weights = similarity.numpy(), _view(row_weight)
    scales, bonuses = _view(candidate_weight), _view(candidate_bonus)
    score = np.empty(tokens)
    for b, (chosen, rounds) in enumerate(zip(count.tolist(), steps.tolist(), strict=True)):
        sim, start = sims[b], prefix[b, :chosen].numpy()
        cover = sim[start].max(0, initial=0.0) + np.float32(SHIFT)
        weight = None if row_weights is None else row_weights[b].astype(np.float64)
        gains = _Gains(sim, weight, cover)
        gains.values[start] = -np.inf
        # A chosen token stays at -inf; its factor becomes 1 because -inf * 0 would be NaN.
        scale = None if scales is None else scales[b].astype(np.float64)
        if scale is not None:
            scale[start] = 1.0
        for t in range(rounds):
            value = gains.values
            if scale is not None:
                value = np.multiply(value, scale, out=score)
            if bonuses is not None:
                value = np.add(value, bonuses[b], out=score)
            picks[b, t] = j = int(value.argmax())
            gains.values[j] = -np.inf
            if scale is not None:
                scale[j] = 1.0
            if t + 1 < rounds:
                gains.rise(j)
    return torch.from_numpy(picks)
