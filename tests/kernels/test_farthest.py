"""Farthest-point rounds against the definition, in every implementation that a CPU can run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from . import oracles
from .oracles import cases, coarse, each, fractions, lopsided, matrix, quick

LOOPS = oracles.implementations("farthest_from_prefix")
every_loop = each(LOOPS)


def shuffled(tokens: int, seed: int, batch: int = 1) -> torch.Tensor:
    """(B, N) int64, each row a random order of all tokens."""
    generators = (torch.Generator().manual_seed(seed + b) for b in range(batch))
    return torch.stack([torch.randperm(tokens, generator=generator) for generator in generators])


@every_loop
@quick
@given(cases, fractions, fractions)
def test_picks_are_the_order_and_then_what_the_definition_says(loop, case, count, budget):
    kind, tokens, seed = case
    similarity = coarse(matrix(kind, tokens, seed), 2**-10)
    budget, order = max(1, min(budget, tokens)), shuffled(tokens, seed)
    picks = loop(similarity, order, torch.tensor([count]), budget)
    assert picks.shape == (1, budget)
    assert picks.dtype == torch.int64
    chosen = order[0, : min(max(count, 1), budget)].tolist()
    scanned = oracles.farthest(similarity[0], chosen, budget - len(chosen))
    assert picks[0].tolist() == chosen + scanned


@quick
@given(cases, fractions, fractions)
def test_backends_agree_on_unrounded_similarities(case, count, budget):
    kind, tokens, seed = case
    similarity = matrix(kind, tokens, seed, batch=2)
    counts, budget = torch.tensor([count, 1]), max(1, min(budget, tokens))
    asked = (similarity, shuffled(tokens, seed, 2), counts, budget)
    first, *others = (loop(*asked) for loop in LOOPS.values())
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("tokens", [2, 9, 40])
def test_backends_read_the_same_rows_of_a_matrix_that_is_not_symmetric(tokens):
    asked = (lopsided(tokens, 1, batch=3), shuffled(tokens, 1, batch=3), tokens // 4, tokens)
    first, *others = (loop(*asked) for loop in LOOPS.values())
    assert all(torch.equal(first, other) for other in others)


@every_loop
@pytest.mark.parametrize("kind", oracles.KINDS)
def test_all_tokens_in_the_end_none_twice(loop, kind):
    picks = loop(matrix(kind, 17, 1), shuffled(17, 0), 1, 17)
    assert sorted(picks[0].tolist()) == list(range(17))
    assert loop(torch.ones(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64), 1, 1).tolist() == [[0]]


@every_loop
def test_counts_differ_per_row_and_orders_may_be_short_and_strided(loop):
    similarity, order = matrix("clustered", 20, 2, batch=3), shuffled(20, 0, batch=3)
    count = torch.tensor([1, 4, 11])
    picks = loop(similarity, order, count, 8)
    strided = order.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(picks, loop(similarity, strided, count.int(), 8))
    for row in range(3):
        alone = loop(similarity[row : row + 1], order[row : row + 1], int(count[row]), 8)
        assert torch.equal(picks[row : row + 1], alone)
    first = loop(similarity, order, 1, 8)
    assert torch.equal(first, loop(similarity, order[:, :1], 1, 8))
    assert torch.equal(first, loop(similarity, order, 0, 8))  # one is taken all the same


@every_loop
def test_strides_do_not_matter_and_inputs_stay_as_they_are(loop):
    wide = matrix("random", 24, 8, batch=2)
    similarity, order = wide[:, ::2, ::2], shuffled(12, 1, batch=2)
    before = [x.clone() for x in (wide, order)]
    expected = loop(similarity.clone(), order, 3, 9)
    assert torch.equal(loop(similarity, order, 3, 9), expected)
    shared = loop(similarity[:1].expand(2, -1, -1), order, 3, 9)
    assert torch.equal(shared[:1], loop(similarity[:1], order[:1], 3, 9))
    assert all(torch.equal(a, b) for a, b in zip(before, (wide, order), strict=True))
