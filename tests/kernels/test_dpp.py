"""Greedy DPP inference: every pick multiplies the determinant most, and exact loops agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given

from . import oracles
from .oracles import cases, each, fractions, lopsided, matrix, quick

LOOPS = oracles.implementations("dpp_greedy")
EXACT = (LOOPS["literal"], LOOPS["torch"])
every_loop = each(LOOPS)


def kernel(kind: str, tokens: int, seed: int, batch: int = 1, ridge: float = 0.0) -> torch.Tensor:
    """Relevance x similarity x relevance, as CDPruner builds it."""
    quality = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) + 0.05
    similarity = matrix(kind, tokens, seed, batch) + ridge * torch.eye(tokens)
    return quality[:, :, None] * similarity * quality[:, None, :]


@every_loop
@quick
@given(cases, fractions)
def test_every_pick_multiplies_the_determinant_most(loop, case, k):
    kind, tokens, seed = case
    matrix_ = kernel(kind, tokens, seed, ridge=0.01)
    picks = loop(matrix_, min(max(k, 1), tokens))[0].tolist()
    for t, pick in enumerate(picks):
        variance = oracles.dpp_variances(matrix_[0].numpy(), picks[:t])
        # float32 loses what it subtracts from the diagonal: relative to that, not to what is left.
        assert variance[pick] >= variance.max() - 2e-6


@every_loop
def test_equals_float64_where_no_two_variances_are_close(loop):
    clear = 0
    for seed in range(20):
        matrix_ = kernel("random", 20, seed, ridge=0.1)
        expected: list[int] = []
        for _ in range(10):
            variance = oracles.dpp_variances(matrix_[0].numpy(), expected)
            if np.diff(np.sort(variance)[-2:])[0] < 1e-5:
                break
            expected.append(int(variance.argmax()))
            clear += 1
        assert loop(matrix_, 10)[0, : len(expected)].tolist() == expected
    assert clear > 150


@quick
@given(cases)
def test_exact_backends_agree_far_beyond_the_rank(case):
    kind, tokens, seed = case
    for matrix_ in (matrix(kind, tokens, seed, batch=2), kernel(kind, tokens, seed, batch=2)):
        assert torch.equal(*(loop(matrix_, tokens) for loop in EXACT))


@pytest.mark.parametrize("kind", ["random", "duplicates", "clustered"])
def test_exact_backends_agree_across_blocks_of_rows(kind):
    # Longer than the blocks in which cpu.py adds up the factor's rows; the ridge gives every step
    # something to explain.
    for matrix_ in (kernel(kind, 180, 4, ridge=0.05), lopsided(180, 4) + 5 * torch.eye(180)):
        picks, literal = (loop(matrix_, 150) for loop in EXACT)
        assert torch.equal(picks, literal)
        variance = oracles.dpp_variances(matrix_[0].numpy(), picks[0, :149].tolist())
        assert variance.max() > 1e-4


@every_loop
def test_ties_duplicates_and_nothing_left(loop):
    assert loop(torch.eye(6)[None], 6).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert loop(torch.ones(1, 1, 1), 1).tolist() == [[0]]
    # Two of each: the first of each pair comes before any second one, and nothing turns into NaN
    # after that.
    pairs = torch.eye(4).repeat(2, 1)
    assert loop((pairs @ pairs.T)[None], 8).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert loop(torch.zeros(1, 5, 5), 5).tolist() == [[0, 1, 2, 3, 4]]
    for kind in oracles.KINDS:
        picks = loop(matrix(kind, 23, 6), 23)[0]
        assert sorted(picks.tolist()) == list(range(23))


@every_loop
def test_rows_are_independent_and_strides_do_not_matter(loop):
    wide = kernel("random", 24, 9, batch=3)
    small = wide[:, ::2, ::2]
    picks = loop(small, 7)
    assert picks.shape == (3, 7) and picks.dtype == torch.int64
    for row in range(3):
        assert torch.equal(picks[row], loop(small[row : row + 1].clone(), 7)[0])
