"""Saliency of patches, recomputed from queries and keys of one attention layer of the tower.

Attention kernels give no weights back, so the few rows that are needed are formed again here, in
float32 whatever the tower's precision. Every function sums over the heads it is given: under tensor
parallelism a rank holds some of the heads, and only the caller's all-reduce, divided by the layer's
full head count, is the mean of FSR's equation (1).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Score elements (batch x query rows x keys) formed at once, head by head: 4 MiB of float32 stay in
# a CPU's cache, which makes the whole four times as fast; a GPU would rather start few kernels.
_CPU_BLOCK, _GPU_BLOCK = 1 << 20, 1 << 24


def cls_attention(query: Tensor, key: Tensor, num_heads: int, scale: float) -> Tensor:
    """Attention of [CLS] to every patch, summed over heads.

    FSR's equation (1) before the division by H. The softmax runs over all 1 + N keys and the [CLS]
    column is dropped afterwards, as in the code of FSR's relatives (VisPruner, VisionZip); a
    softmax over the patches alone would weigh the heads differently.

    Shapes: query, key (B, 1 + N, num_heads * dim), [CLS] at row 0 -> (B, N) float32.
    Errors: ValueError for other shapes.
    """
    q, k = _split_heads(query[:, :1], key, num_heads, prefix=1)
    return _attend(q, k, scale)[:, :, 0, 1:].sum(1)


def attention_map(query: Tensor, key: Tensor, num_heads: int, scale: float) -> Tensor:
    """Attention of every patch to every patch, summed over heads; rows leave [CLS] out.

    Shapes: query, key (B, 1 + N, num_heads * dim), [CLS] at row 0 -> (B, N, N) float32, rows are
    queries. Errors: ValueError for other shapes.
    """
    q, k = _split_heads(query, key, num_heads, prefix=1)
    total = q.new_zeros(q.shape[0], q.shape[2] - 1, q.shape[2] - 1)
    for start, weight, sums in _blocks(q, k, scale, first=1):
        total[:, start - 1 : start - 1 + weight.shape[1]] += weight.div_(sums)[..., 1:]
    return total


def received_attention(
    query: Tensor,
    key: Tensor,
    num_heads: int,
    scale: float,
    prefix: int = 0,
    prefix_gives: bool = False,
) -> Tensor:
    """Attention a patch receives, mean over the tokens that give it, summed over heads.

    `prefix` leading rows (class or register tokens) are keys like any other, and never returned.
    Without `prefix_gives` patches alone count as givers: FSR's saliency for towers without [CLS],
    of which the paper says only "aggregated self-attention"; the column mean is the plainest
    reading. With it all rows are givers, as HiPrune averages. Queries go in blocks, so that memory
    stays bounded at any number of tokens.

    Shapes: query, key (B, prefix + N, num_heads * dim) -> (B, N) float32.
    Errors: ValueError for other shapes.
    """
    q, k = _split_heads(query, key, num_heads, prefix=prefix)
    batch, _, rows, _ = q.shape
    total = q.new_zeros(batch, rows)
    first = 0 if prefix_gives else prefix
    for _, weight, sums in _blocks(q, k, scale, first):
        total += (sums.reciprocal().transpose(-1, -2) @ weight)[:, 0]
    return total[:, prefix:] / (rows - first)


def _blocks(q: Tensor, k: Tensor, scale: float, first: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Softmax before its division, by head and block of rows: start, (B, r, S), sums (B, r, 1)."""
    batch, heads, rows, _ = q.shape
    step = max(1, (_CPU_BLOCK if q.device.type == "cpu" else _GPU_BLOCK) // (batch * rows))
    for head in range(heads):
        keys = k[:, head].transpose(-1, -2).contiguous()
        for start in range(first, rows, step):
            weight = (q[:, head, start : start + step] * scale) @ keys
            weight = weight.sub_(weight.amax(-1, keepdim=True)).exp_()
            yield start, weight, weight.sum(-1, keepdim=True)


def _attend(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.softmax((q @ k.transpose(-1, -2)) * scale, dim=-1)


def _split_heads(query: Tensor, key: Tensor, num_heads: int, prefix: int) -> tuple[Tensor, Tensor]:
    """(B, S, heads * dim) -> (B, heads, S, dim) float32, if the layer looks as promised."""
    if query.ndim != 3 or key.ndim != 3 or query.shape[::2] != key.shape[::2]:
        shapes = f"{tuple(query.shape)} and {tuple(key.shape)}"
        raise ValueError(
            f"query and key must be (batch, tokens, heads * dim) of one layer, got {shapes}"
        )
    if num_heads < 1 or query.shape[2] % num_heads:
        raise ValueError(f"a width of {query.shape[2]} does not divide into {num_heads} heads")
    if prefix < 0 or key.shape[1] <= prefix:
        raise ValueError(f"{key.shape[1]} tokens leave no patch after {prefix} leading ones")
    if query.shape[1] not in (1, key.shape[1]):
        raise ValueError(f"query has {query.shape[1]} tokens, key {key.shape[1]}")

    def split(x: Tensor) -> Tensor:
        return x.float().unflatten(2, (num_heads, -1)).transpose(1, 2)

    return split(query), split(key)
