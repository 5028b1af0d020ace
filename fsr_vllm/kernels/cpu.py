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


def _view(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.numpy()


def farthest(
    similarity: torch.Tensor,
    prefix: torch.Tensor,
    count: torch.Tensor,
    weight: torch.Tensor | None,
    budget: int,
) -> torch.Tensor:
    """Farthest-point rounds with a running minimum of distances: one row is read per step."""
    batch, tokens, _ = similarity.shape
    picks = np.empty((batch, budget), np.int64)
    weights, rows = _view(weight), similarity.numpy()
    distance = np.empty(tokens, np.float32)
    for b, chosen in enumerate(count.tolist()):
        sim, start = rows[b], prefix[b, :chosen].numpy()
        picks[b, :chosen] = start
        # 1 - x rounds monotonically, so the smallest distance is exactly 1 - the largest
        # similarity.
        nearest = np.subtract(1.0, sim[start].max(0))
        # A chosen token stays at -inf under minimum; its weight becomes 1 because -inf * 0 would be
        # NaN.
        nearest[start] = -np.inf
        scale = None if weights is None else weights[b].copy()
        if scale is not None:
            scale[start] = 1.0
        for t in range(chosen, budget):
            score = nearest if scale is None else np.multiply(nearest, scale, out=distance)
            picks[b, t] = j = int(score.argmax())
            np.subtract(1.0, sim[j], out=distance)
            np.minimum(nearest, distance, out=nearest)
            nearest[j] = -np.inf
            if scale is not None:
                scale[j] = 1.0
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
    N. Similarities and covers are kept shifted by SHIFT, where adding rounds to the grid and
    differences are those of the unshifted values.
    """

    def __init__(self, sim: np.ndarray, weight: np.ndarray | None, cover: np.ndarray):
        self.sim = sim
        self.weight = None if weight is None else weight.astype(np.float64)[:, None]
        self.block = np.empty((min(_BLOCK, len(sim)), len(sim)), np.float32)
        self.values = np.zeros(len(sim))
        # From a cover that no token can reach, lowering it to `cover` brings in every gain.
        self._drop(np.arange(len(sim)), cover, np.full(len(sim), np.inf, np.float32))
        np.negative(self.values, out=self.values)

    def rise(self, low: np.ndarray, high: np.ndarray) -> None:
        """The cover rises from `low` to `high`."""
        risen = np.flatnonzero(high > low)
        self._drop(risen, low[risen], high[risen])

    def _drop(self, tokens: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        for start in range(0, len(tokens), _BLOCK):
            part = slice(start, start + _BLOCK)
            index, lo, hi = tokens[part], low[part, None], high[part, None]
            x = self.block[: len(index)]
            np.take(self.sim, index, axis=0, out=x, mode="clip")  # the other modes copy once more
            np.add(x, SHIFT, out=x)
            np.maximum(x, lo, out=x)
            np.minimum(x, hi, out=x)
            # Not a matrix product: its threads would fight with those of the server for these few
            # thousand additions.
            if self.weight is None:
                self.values -= x.sum(0, dtype=np.float64)
                self.values += lo.sum(dtype=np.float64)
            else:
                weight = self.weight[index]
                self.values -= (weight * x).sum(0)
                self.values += (weight * lo).sum()


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
        cover = np.full(tokens, SHIFT, np.float32)
        if chosen:
            np.maximum(cover, sim[start].max(0) + np.float32(SHIFT), out=cover)
        gains = _Gains(sim, None if row_weights is None else row_weights[b], cover)
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
            j = int(value.argmax())
            picks[b, t] = j
            gains.values[j] = -np.inf
            if scale is not None:
                scale[j] = 1.0
            if t + 1 == rounds:
                break
            higher = np.maximum(cover, sim[j] + np.float32(SHIFT))
            gains.rise(cover, higher)
            cover = higher
    return torch.from_numpy(picks)
