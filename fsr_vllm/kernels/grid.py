"""Sums that do not depend on their order, so that every backend picks the same tokens.

A coverage gain is a sum over all N tokens, and no two backends add in the same order. Float
rounding would then break exact ties (two candidates that cover the same values in another order)
differently on each device. So similarities are first rounded to multiples of 2^-20, and row weights
to 2^-28 of the power of two above their row's sum. Every product is then a multiple of 2^-48 of
that power, and similarities of |S| < 4, even shifted by SHIFT, add up to less than 16 times it: 52
of the 53 bits of a float64, whatever N is. Additions are exact, and so is taking from a gain what a
pick covered. Without weights all are multiples of 2^-20, and sums of any N below 2^29 are exact.

The rounding (at most 4.8e-7 of a cosine) is that of a float32 GEMM of real features, and far below
that of bfloat16 features; a weight is off by at most 2^-28 of what all of its row weigh together.
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


# Steps of a weight per power of two above its row's sum, and of the sum that finds this power.
_STEPS, _FINE = 2.0**28, 2.0**36


def snap_weights(weights: torch.Tensor) -> torch.Tensor:
    """Weights (B, N) rounded to 2^-28 of the power of two above their row's sum, for N <= 2^17.

    Float32, not negative; the answer is float32 too, which holds every such multiple exactly. The
    power is the same on every device: the sum is taken on a grid as well.
    """
    exact = weights.double()
    unit = _power_above(exact.amax(-1, keepdim=True))
    total = (exact / unit).mul_(_FINE).round_().sum(-1, keepdim=True)  # integers below 2^53
    unit = unit * (_power_above(total) / _FINE)
    return (exact / unit).mul_(_STEPS).round_().mul_(unit / _STEPS).float()


def _power_above(x: torch.Tensor) -> torch.Tensor:
    """The power of two above x, 1 for 0: without a pow(), whose last bit may differ by device."""
    mantissa, _ = torch.frexp(x)
    return torch.where(x > 0, x / mantissa, torch.ones_like(x))
