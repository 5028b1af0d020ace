"""Sums that do not depend on their order, so that every backend picks the same tokens.

A coverage gain is a sum over all N tokens, and no two backends add in the same order. Float
rounding would then break exact ties (two candidates that cover the same values in another order)
differently on each device. So similarities are first rounded to multiples of 2^-20, and row weights
to 2^-20 of their row's largest: every product is a multiple of 2^-40, every sum of N <= 4096 of
them fits the 53 bits of a float64, and additions become exact. The rounding (at most 4.8e-7 of a
cosine) is that of a float32 GEMM of real features, and far below that of bfloat16 features.
"""

from __future__ import annotations

import torch

# Between 8 and 16 a float32 counts in steps of 2^-20: adding 12 rounds any |x| < 4 to that step
# (nearest, ties to even), and taking it off again is exact.
SHIFT = 12.0


def snap(values: torch.Tensor) -> torch.Tensor:
    """Float32 values rounded to multiples of 2^-20, for |x| < 4.

    Beyond that the steps are coarser, but the same on every device.
    """
    return (values + SHIFT) - SHIFT


def snap_weights(weights: torch.Tensor) -> torch.Tensor:
    """Weights (B, N) rounded to 2^-20 of the power of two above their row's largest.

    Float32, not negative.
    """
    largest = weights.amax(-1, keepdim=True)
    mantissa, _ = torch.frexp(largest)
    # largest / mantissa is that power of two, without a pow() whose last bit could differ between
    # devices.
    unit = torch.where(largest > 0, largest / mantissa, torch.ones_like(largest))
    return snap(weights / unit) * unit
