"""The public greedy loops: checks, defaults, and the choice of an implementation by device.

Every backend has `farthest`, `dpp` and `coverage`, and gets arguments that were checked and
completed here: `prefix` (B, P) and `count` (B,) say which tokens are chosen before the loop starts
(the first `count` entries of a row of `prefix`, in that order), `steps` (B,) how many to add (never
more than are left), `width` how many columns the answer has (-1 beyond a row's own picks).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

from .grid import snap_weights

MAX_TRITON_TOKENS = 4096
"""Tokens that one Triton program holds in registers; more take the fixed-step torch loops."""

ENVIRONMENT = "FSR_KERNELS"
"""Environment variable with the same values as the `backend` argument."""

_BACKENDS = ("auto", "torch", "masked", "triton")

# A variance from which on only rounding noise is left, as a float32, so that all backends compare
# with the same number.
_NOISE = torch.tensor(1e-12, dtype=torch.float32).item()

_LARGEST = 1e30  # far above any gain, and finite in sums of float32


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def backend_for(device: torch.device, tokens: int, backend: str | None = None) -> str:
    """Name of the implementation that will run: "cpu", "masked" or "triton".

    `backend` (else the environment variable FSR_KERNELS, else "auto"): "torch" is the loop that
    needs no compiler (numpy views on the CPU, fixed masked steps on a GPU), "auto" the fastest for
    the device, the others force one implementation. ValueError for an unknown name, and for
    "triton" on more than 4096 tokens.
    """
    name = backend or os.environ.get(ENVIRONMENT) or "auto"
    if name not in _BACKENDS:
        raise ValueError(f"unknown kernel backend {name!r}: choose one of {', '.join(_BACKENDS)}")
    small = tokens <= MAX_TRITON_TOKENS
    if name == "triton" and not small:
        raise ValueError(
            f"the triton backend holds at most {MAX_TRITON_TOKENS} tokens, not {tokens}: "
            "use 'auto' or 'torch'"
        )
    if name == "auto":
        name = "triton" if device.type == "cuda" and small and _has_triton() else "torch"
    if name == "torch":
        name = "cpu" if device.type == "cpu" else "masked"
    return name


def _module(matrix: torch.Tensor, backend: str | None) -> ModuleType:
    name = backend_for(matrix.device, matrix.shape[-1], backend)
    # Imported on first use: importing this package must not import Triton.
    return importlib.import_module(
        "fsr_vllm.kernels." + ("triton_ops" if name == "triton" else name)
    )


def _matrix(name: str, value: torch.Tensor) -> torch.Tensor:
    if value.dim() != 3 or value.shape[1] != value.shape[2] or not value.shape[1]:
        raise ValueError(f"{name} must have shape (B, N, N) with N >= 1, not {tuple(value.shape)}")
    if value.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, not {value.dtype}")
    return value.detach().contiguous()


def _vector(
    name: str, value: torch.Tensor | None, matrix: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor | None:
    if value is None:
        return None
    wanted, given = ((tuple(x.shape[:2]), x.device) for x in (matrix, value))
    if value.dim() != 2 or given != wanted:
        raise ValueError(
            f"{name} must have shape {wanted[0]} on {wanted[1]}, "
            f"not {tuple(value.shape)} on {given[1]}"
        )
    if value.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, not {value.dtype}")
    return value.detach().contiguous()


def _counts(name: str, value: int | torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(B,) int64 on the matrix's device."""
    if not isinstance(value, torch.Tensor):
        if value < 0:
            raise ValueError(f"{name} must not be negative, is {value}")
        return torch.full(matrix.shape[:1], value, dtype=torch.int64, device=matrix.device)
    fits = value.shape == matrix.shape[:1] and value.device == matrix.device
    if not fits or value.is_floating_point():
        raise ValueError(
            f"{name} must be integers of shape {tuple(matrix.shape[:1])} on {matrix.device}"
        )
    return value.detach().to(torch.int64)


def _as_prefix(
    selected: torch.Tensor | None, matrix: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen tokens (B, N) bool as indices at the front of (B, N), and their number (B,)."""
    batch, tokens = matrix.shape[:2]
    if selected is None:
        none = torch.zeros(batch, dtype=torch.int64, device=matrix.device)
        return none[:, None], none
    place = torch.arange(tokens, device=matrix.device).expand(batch, tokens)
    # Tokens that are not chosen all write to a last column, which is cut off.
    slot = torch.where(selected, selected.cumsum(-1) - 1, tokens)
    prefix = torch.zeros((batch, tokens + 1), dtype=torch.int64, device=matrix.device)
    return prefix.scatter_(1, slot, place)[:, :tokens], selected.sum(-1)


def farthest_from_prefix(
    similarity: torch.Tensor,
    order: torch.Tensor,
    count: int | torch.Tensor,
    budget: int,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """The first `count` tokens of an order, then farthest points up to `budget`: (B, budget) int64.

    Step by step the token is added that is farthest from all chosen ones. Distance is 1 -
    similarity (float32), a token's distance to a set the smallest one. Ties go to the lower index.
    FSR's Focus and Scan in one call (arXiv 2602.05809, eq. 4 and 5): `count` is data dependent,
    differs from row to row and stays on the device. Also the max-min rule of DivPrune (arXiv
    2503.02175, section 3); k-center greedy by Gonzalez, 1985.

    similarity (B, N, N) float32, symmetric (row j is read for the distances to token j); order
    (B, M) int64, the best first, distinct within a row, M >= the largest count; count: int or (B,),
    of which at least 1 and at most `budget` count; budget in 1..N. Column t < count is order[:, t],
    the others are in pick order. All backends return the same indices. ValueError for shapes,
    dtypes, devices or a budget that do not fit; values are not looked at.
    """
    similarity = _matrix("similarity", similarity)
    batch, tokens = similarity.shape[:2]
    fits = order.dim() == 2 and order.shape[0] == batch and order.shape[1] >= 1
    if not fits or order.dtype != torch.int64 or order.device != similarity.device:
        raise ValueError(
            f"order must be int64 of shape ({batch}, M) with M >= 1 on {similarity.device}"
        )
    if not 1 <= budget <= tokens:
        raise ValueError(f"budget must lie in 1..{tokens}, is {budget}")
    prefix = order.detach() if order.stride(1) == 1 else order.detach().contiguous()
    given = _counts("count", count, similarity).clamp(1, min(budget, order.shape[1]))
    return _module(similarity, backend).farthest(similarity, prefix, given, budget)


def dpp_greedy(kernel: torch.Tensor, k: int, *, backend: str | None = None) -> torch.Tensor:
    """Greedy MAP of a determinantal point process: (B, k) int64 in pick order.

    Each pick is the token with the largest variance left once the chosen ones are projected out,
    which multiplies the determinant of the chosen block the most. Incremental Cholesky in O(N k^2)
    after Chen, Zhang and Zhou, NeurIPS 2018 (arXiv 1709.05135); used by CDPruner (arXiv
    2506.10967). Ties go to the lower index.

    kernel (B, N, N) float32, symmetric and positive semidefinite (row j is read for token j); k in
    1..N. Once the largest variance is 1e-12 or less only rounding noise is left: it is not divided
    by, and the remaining picks follow the variances as they are. float32 in a fixed order of
    additions, each product rounded before it is added: CPU and Triton return the same indices;
    "masked" may differ where two variances agree to a few roundings. ValueError for shapes, dtypes
    or a k that do not fit; values are not looked at.
    """
    kernel = _matrix("kernel", kernel)
    if not 1 <= k <= kernel.shape[1]:
        raise ValueError(f"k must lie in 1..{kernel.shape[1]}, is {k}")
    return _module(kernel, backend).dpp(kernel, k, _NOISE)


def coverage_greedy(
    similarity: torch.Tensor,
    steps: int | torch.Tensor,
    row_weight: torch.Tensor | None = None,
    candidate_weight: torch.Tensor | None = None,
    selected: torch.Tensor | None = None,
    max_steps: int | None = None,
    *,
    candidate_bonus: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Add, step by step, the token that covers most of what is uncovered: (B, max_steps) int64.

    With c_i the best similarity of token i to a chosen token, at least 0, candidate j scores gain_j
    * candidate_weight_j + candidate_bonus_j, where gain_j = sum_i row_weight_i * max(0, S_ij -
    c_i); then c_i = max(c_i, S_ji). Ties go to the lower index. SCOPE's rule (its saliency power is
    `candidate_weight`, its additive variant `candidate_bonus`); greedy facility location,
    Nemhauser, Wolsey and Fisher, 1978.

    similarity (B, N, N) float32 cosines, symmetric; steps: how many to add, an int or one per row
    (B,), on the device and never read back: then `max_steps` bounds it; row_weight,
    candidate_weight (B, N) float32 >= 0; candidate_bonus (B, N) float32; selected (B, N) bool:
    chosen beforehand, c is raised by their rows. Columns are in pick order, -1 where a row has no
    more picks. Similarities are rounded to multiples of 2^-20 and row weights to 2^-28 of about
    their row's sum, so that sums are exact for every N (`grid.py`) and all backends return the same
    indices.
    ValueError for shapes, dtypes, devices or counts that do not fit; values are not looked at.
    """
    similarity = _matrix("similarity", similarity)
    chosen = _vector("selected", selected, similarity, torch.bool)
    rows = _vector("row_weight", row_weight, similarity)
    candidates = _vector("candidate_weight", candidate_weight, similarity)
    bonus = _vector("candidate_bonus", candidate_bonus, similarity)
    if bonus is not None:  # infinite, a chosen token would be picked again
        bonus = bonus.clamp(-_LARGEST, _LARGEST)
    width = max_steps if isinstance(steps, torch.Tensor) or max_steps is not None else steps
    if width is None or width < 0:
        raise ValueError(
            "max_steps, the number of columns, must be >= 0, and given if steps is a tensor"
        )
    prefix, count = _as_prefix(chosen, similarity)
    wanted = _counts("steps", steps, similarity).clamp(0, width)
    rounds = torch.minimum(wanted, similarity.shape[1] - count)
    rows = None if rows is None else snap_weights(rows)
    return _module(similarity, backend).coverage(
        similarity, prefix, count, rounds, rows, candidates, bonus, width
    )
