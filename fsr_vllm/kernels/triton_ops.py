"""The three greedy loops as Triton kernels: one program per image runs a whole loop in one launch.

Running state (distances, variances, gains) stays in registers; a step reads one row of the matrix
(`dpp`: also the factor's rows so far; `coverage`: also the rows of the tokens whose cover rose).
Step counts are read on the device, so nothing is sent back to the host. Parameters as in
`dispatch.py`, and indices those of the CPU: multiplications and additions are never fused
(`enable_fp_fusion=False`), roots and divisions are the correctly rounded ones, ties go to the lower
index. Where a program reads back what other threads of it wrote to global memory, a barrier stands
between.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a kernel's arguments, and knows no others than its own.

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Rows read at a time in the inner loops: independent loads that wait together. Partial sums in
# float32 on the grid of `grid.py` stay exact up to 4 rows.
_UNROLL = 4


# Sizes that differ between requests are not specialised on: each new kind would compile in the
# middle of serving.
@triton.jit(do_not_specialize=["prefix_stride", "width"])
def _farthest(
    similarity, prefix, prefix_stride, count, picks, tokens, width,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < tokens
    similarity += image * tokens * tokens
    prefix += image * prefix_stride
    picks += image * width
    chosen = tl.load(count + image).to(tl.int32)
    # -inf: may not be picked (chosen, or beyond the last token); minimum keeps it.
    nearest = tl.where(inside, float("inf"), float("-inf"))
    for start in range(0, chosen, UNROLL):
        for u in tl.static_range(UNROLL):
            # Past the end the last one again, which changes nothing.
            t = tl.minimum(start + u, chosen - 1)
            j = tl.load(prefix + t)
            row = tl.load(similarity + j * tokens + place, mask=inside, other=0.0)
            nearest = tl.where(place == j, float("-inf"), tl.minimum(nearest, 1.0 - row))
            tl.store(picks + t, j)
    for t in range(chosen, width):
        j = tl.argmax(nearest, 0, tie_break_left=True).to(tl.int64)
        tl.store(picks + t, j)
        row = tl.load(similarity + j * tokens + place, mask=inside, other=0.0)
        nearest = tl.where(place == j, float("-inf"), tl.minimum(nearest, 1.0 - row))


@triton.jit(do_not_specialize=["steps"])
def _dpp(
    kernel, factor, factor_stride, picks, tokens, steps, eps,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < tokens
    kernel += image * tokens * tokens
    factor += image * factor_stride
    picks += image * steps
    variance = tl.load(kernel + place.to(tl.int64) * (tokens + 1), mask=inside, other=float("-inf"))
    for t in range(steps):
        best, j = tl.max(variance, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(picks + t, j.to(tl.int64))
        explained = tl.zeros([BLOCK], tl.float32)
        for start in range(0, t, UNROLL):
            for u in tl.static_range(UNROLL):
                past = factor + (start + u) * tokens  # rows not written yet are zeros
                explained += tl.load(past + j) * tl.load(past + place, mask=inside, other=0.0)
        residual = (
            tl.load(kernel + j.to(tl.int64) * tokens + place, mask=inside, other=0.0) - explained
        )
        is_noise = best <= eps
        row = residual * tl.div_rn(1.0, tl.sqrt_rn(tl.where(is_noise, 1.0, best)))
        row = tl.where(is_noise, 0.0, row)
        tl.store(factor + t * tokens + place, row, mask=inside)
        tl.debug_barrier()  # the next step reads factor[:, j] in every thread
        variance = tl.where(place == j, float("-inf"), variance - row * row)


@triton.jit(do_not_specialize=["prefix_stride"])
def _cover(
    similarity, prefix, prefix_stride, count, covered, tokens,
    COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Cover of the chosen: covered = max(covered, similarity), by image and block of tokens."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = place < tokens
    covered += image * tokens
    cover = tl.load(covered + place, mask=inside, other=0.0)
    chosen = tl.load(count + image).to(tl.int32)
    for start in range(0, chosen, UNROLL):
        for u in tl.static_range(UNROLL):
            j = tl.load(prefix + image * prefix_stride + tl.minimum(start + u, chosen - 1))
            row = tl.load(
                similarity + (image * tokens + j) * tokens + place, mask=inside, other=0.0
            )
            cover = tl.maximum(cover, (row + 12.0) - 12.0)  # grid.SHIFT
    tl.store(covered + place, cover, mask=inside)


@triton.jit
def _gains(
    similarity, covered, row_weight, gains, tokens,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gains before the first pick, one program per image and block of candidates."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float64)
    for start in range(0, tokens, ROWS):
        i = start + tl.arange(0, ROWS)
        mask = (i < tokens)[:, None] & (place < tokens)[None, :]
        row = tl.load(
            similarity + (image * tokens + i)[:, None] * tokens + place[None, :],
            mask=mask,
            other=0.0,
        )
        cover = tl.load(covered + image * tokens + i, mask=i < tokens, other=0.0)
        rise = tl.where(mask, tl.maximum((row + 12.0) - 12.0 - cover[:, None], 0.0), 0.0).to(
            tl.float64
        )  # grid.SHIFT
        if WEIGHTED:
            rise *= tl.load(row_weight + image * tokens + i, mask=i < tokens, other=0.0).to(
                tl.float64
            )[:, None]
        total += tl.sum(rise, 0)
    tl.store(gains + image * tokens + place, total, mask=place < tokens)


@triton.jit(do_not_specialize=["prefix_stride", "width"])
def _coverage(
    similarity, prefix, prefix_stride, count, steps, covered, gains, row_weight, scale, bonus,
    picks, risen, low, high, tokens, width,
    WEIGHTED: tl.constexpr, SCALED: tl.constexpr, RAISED: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A cover that rises from low to high lowers gain_j by w_i (clip(S_ij, low, high) - low)."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < tokens
    similarity += image * tokens * tokens
    prefix += image * prefix_stride
    picks += image * width
    row_weight += image * tokens
    risen += image * tokens
    low += image * tokens
    high += image * tokens
    gain = tl.load(gains + image * tokens + place, mask=inside, other=0.0)
    cover = tl.load(covered + image * tokens + place, mask=inside, other=0.0)
    if SCALED:
        factor = tl.load(scale + image * tokens + place, mask=inside, other=0.0).to(tl.float64)
    if RAISED:
        extra = tl.load(bonus + image * tokens + place, mask=inside, other=0.0).to(tl.float64)
    free = inside
    for t in range(tl.load(count + image).to(tl.int32)):
        free = free & (place != tl.load(prefix + t))
    for t in range(tl.load(steps + image).to(tl.int32)):
        score = gain
        if SCALED:
            score = score * factor
        if RAISED:
            score = score + extra
        j = tl.argmax(tl.where(free, score, float("-inf")), 0, tie_break_left=True).to(tl.int64)
        tl.store(picks + t, j)
        free = free & (place != j)
        row = tl.load(similarity + j * tokens + place, mask=inside, other=0.0)
        higher = tl.maximum(cover, (row + 12.0) - 12.0)  # grid.SHIFT
        rises = (higher > cover) & inside
        slot = tl.cumsum(rises.to(tl.int32), 0) - 1
        tl.debug_barrier()  # all threads have read the last step's list
        tl.store(risen + slot, place, mask=rises)
        tl.store(low + slot, cover, mask=rises)
        tl.store(high + slot, higher, mask=rises)
        tl.debug_barrier()  # and now see this step's
        cover = higher
        many = tl.sum(rises.to(tl.int32), 0)
        for start in range(0, many, UNROLL):
            drop = tl.zeros([BLOCK], tl.float32)
            for u in tl.static_range(UNROLL):
                q = start + u
                i = tl.load(risen + q, mask=q < many, other=0)
                lo = tl.load(low + q, mask=q < many, other=0.0)
                hi = tl.load(high + q, mask=q < many, other=0.0)
                # Behind the list's end this is row 0, clipped to 0..0.
                row = tl.load(similarity + i.to(tl.int64) * tokens + place, mask=inside, other=0.0)
                fall = tl.minimum(tl.maximum((row + 12.0) - 12.0, lo), hi) - lo
                if WEIGHTED:
                    gain -= fall.to(tl.float64) * tl.load(
                        row_weight + i, mask=q < many, other=0.0
                    ).to(tl.float64)
                else:
                    drop += fall
            if not WEIGHTED:
                gain -= drop.to(tl.float64)


def _launch(tokens: int) -> tuple[int, dict[str, object]]:
    """Block size, a power of two that holds every token, and options: about 8 tokens per thread."""
    block = max(32, triton.next_power_of_2(tokens))
    return block, {"num_warps": min(16, max(1, block // 256)), "enable_fp_fusion": False}


def farthest(
    similarity: torch.Tensor, prefix: torch.Tensor, count: torch.Tensor, budget: int
) -> torch.Tensor:
    """Farthest-point rounds, one launch."""
    batch, tokens, _ = similarity.shape
    picks = torch.empty((batch, budget), dtype=torch.int64, device=similarity.device)
    block, options = _launch(tokens)
    _farthest[(batch,)](
        similarity, prefix, prefix.stride(0), count, picks, tokens, budget,
        BLOCK=block, UNROLL=_UNROLL, **options,
    )  # fmt: skip
    return picks


def dpp(kernel: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    """Fast greedy MAP of a DPP, one launch; the factor (B, K, N) lies in global memory."""
    batch, tokens, _ = kernel.shape
    picks = torch.empty((batch, steps), dtype=torch.int64, device=kernel.device)
    # Zeros, and whole groups of rows: the inner loop needs no masks.
    rows = triton.cdiv(steps, _UNROLL) * _UNROLL
    factor = torch.zeros((batch, rows, tokens), dtype=torch.float32, device=kernel.device)
    block, options = _launch(tokens)
    _dpp[(batch,)](
        kernel, factor, factor.stride(0), picks, tokens, steps, eps,
        BLOCK=block, UNROLL=_UNROLL, **options,
    )  # fmt: skip
    return picks


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
    """Coverage rounds in three launches: cover and gains, parallel over blocks; then the loop."""
    batch, tokens, _ = similarity.shape
    picks = torch.full((batch, width), -1, dtype=torch.int64, device=similarity.device)
    block, options = _launch(tokens)
    columns = min(64, block)
    grid = (batch, triton.cdiv(tokens, columns))
    weighted = row_weight is not None
    # Never read where absent: any pointer will do.
    weight, scale, bonus = (
        similarity if x is None else x for x in (row_weight, candidate_weight, candidate_bonus)
    )
    cover = similarity.new_zeros((batch, tokens))
    low, high = torch.empty_like(cover), torch.empty_like(cover)
    gains = torch.empty_like(cover, dtype=torch.float64)
    risen = torch.empty_like(cover, dtype=torch.int32)
    _cover[grid](
        similarity, prefix, prefix.stride(0), count, cover, tokens,
        COLUMNS=columns, UNROLL=_UNROLL, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    _gains[grid](
        similarity, cover, weight, gains, tokens,
        WEIGHTED=weighted, ROWS=32, COLUMNS=columns, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    _coverage[(batch,)](
        similarity, prefix, prefix.stride(0), count, steps, cover, gains, weight, scale, bonus,
        picks, risen, low, high, tokens, width,
        WEIGHTED=weighted, SCALED=candidate_weight is not None, RAISED=candidate_bonus is not None,
        BLOCK=block, UNROLL=_UNROLL, **options,
    )  # fmt: skip
    return picks
