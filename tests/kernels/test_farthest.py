"""Farthest-point rounds against the definition, in every implementation that a CPU can run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsr_vllm.kernels import farthest_from_prefix, farthest_point

from . import oracles
from .oracles import cases, coarse, draws, fractions, lopsided, matrix, quick

BACKENDS = ("reference", "torch", "masked")


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(cases, fractions, st.booleans())
def test_picks_what_the_definition_says(backend, case, steps, weighted):
    kind, tokens, seed = case
    similarity = coarse(matrix(kind, tokens, seed), 2**-10)
    weight, selected = draws(tokens, seed)
    picks = farthest_point(
        similarity, selected, steps, weight if weighted else None, backend=backend
    )
    expected = oracles.farthest(
        similarity[0].numpy(),
        selected[0].nonzero()[:, 0].tolist(),
        steps,
        weight[0].numpy() if weighted else None,
    )
    assert picks[0].tolist() == expected + [-1] * (steps - len(expected))


@quick
@given(cases, fractions, st.booleans())
def test_backends_agree_on_unrounded_similarities(case, steps, weighted):
    kind, tokens, seed = case
    similarity = matrix(kind, tokens, seed, batch=2)
    weight, selected = draws(tokens, seed, batch=2)
    weight = (
        torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) * weight
        if weighted
        else None
    )
    first, *others = (
        farthest_point(similarity, selected, steps, weight, backend=name) for name in BACKENDS
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("tokens", [2, 9, 40])
def test_backends_read_the_same_rows_of_a_matrix_that_is_not_symmetric(tokens):
    similarity = lopsided(tokens, 1, batch=3)
    _, selected = draws(tokens, 1, batch=3)
    first, *others = (
        farthest_point(similarity, selected, tokens, backend=name) for name in BACKENDS
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_row_takes_its_own_number_of_steps(backend):
    similarity = matrix("random", 12, 0, batch=5)
    _, selected = draws(12, 0, batch=5)
    selected[4] = True  # nothing left to add
    steps = torch.tensor([0, 3, 7, 99, 4])
    picks = farthest_point(similarity, selected, steps, max_steps=7, backend=backend)
    assert picks.shape == (5, 7) and picks.dtype == torch.int64
    for row, count in enumerate([0, 3, 7, 7, 0]):
        alone = farthest_point(
            similarity[row : row + 1], selected[row : row + 1], count, backend=backend
        )
        assert picks[row].tolist() == alone[0].tolist() + [-1] * (7 - count)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_row_starts_at_its_largest_weight(backend):
    similarity = matrix("random", 9, 3)
    weight = torch.tensor([[0.0, 0.5, 0.25, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
    assert farthest_point(similarity, None, 1, backend=backend).tolist() == [[0]]
    assert farthest_point(
        similarity, torch.zeros(1, 9, dtype=torch.bool), 1, weight, backend=backend
    ).tolist() == [[3]]
    # The stand-in distance of the empty start is forgotten: the next pick is the farthest from the
    # first alone.
    later = farthest_point(similarity, None, 2, backend=backend)[0, 1]
    assert later == similarity[0, 0].argmin()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", oracles.KINDS)
def test_all_tokens_in_the_end_none_twice(backend, kind):
    picks = farthest_point(matrix(kind, 17, 1), None, 17, torch.zeros(1, 17), backend=backend)
    assert sorted(picks[0].tolist()) == list(range(17))
    assert farthest_point(torch.ones(1, 1, 1), None, 3, backend=backend).tolist() == [[0, -1, -1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_one_change_nothing_and_weights_of_zero_leave_the_lowest_index(backend):
    similarity = matrix("random", 30, 5)
    selected = torch.arange(30)[None] < 2
    plain = farthest_point(similarity, selected, 10, backend=backend)
    assert torch.equal(
        plain, farthest_point(similarity, selected, 10, torch.ones(1, 30), backend=backend)
    )
    zero = farthest_point(similarity, selected, 4, torch.zeros(1, 30), backend=backend)
    assert zero.tolist() == [[2, 3, 4, 5]]


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(cases, fractions, fractions, st.booleans())
def test_from_prefix_is_the_order_and_then_the_scan(backend, case, count, budget, weighted):
    kind, tokens, seed = case
    similarity = coarse(matrix(kind, tokens, seed), 2**-10)
    budget = min(budget, tokens)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[None]
    weight = draws(tokens, seed)[0] if weighted else None
    picks = farthest_from_prefix(
        similarity, order, torch.tensor([count]), budget, weight, backend=backend
    )
    given_ = order[0, : min(count, budget)].tolist()
    scanned = oracles.farthest(
        similarity[0], given_, budget - len(given_), None if weight is None else weight[0]
    )
    assert picks[0].tolist() == given_ + scanned


@pytest.mark.parametrize("backend", BACKENDS)
def test_from_prefix_differs_per_row_and_takes_short_and_strided_orders(backend):
    similarity = matrix("clustered", 20, 2, batch=3)
    order = torch.stack(
        [torch.randperm(20, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    )
    count = torch.tensor([0, 4, 11])
    picks = farthest_from_prefix(similarity, order, count, 8, backend=backend)
    strided = order.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(
        picks, farthest_from_prefix(similarity, strided, count.int(), 8, backend=backend)
    )
    for row in range(3):
        alone = (similarity[row : row + 1], order[row : row + 1], int(count[row]), 8)
        assert torch.equal(picks[row : row + 1], farthest_from_prefix(*alone, backend=backend))
    short = farthest_from_prefix(similarity, order[:, :1], 1, 8, backend=backend)
    assert torch.equal(short, farthest_from_prefix(similarity, order, 1, 8, backend=backend))
    assert farthest_from_prefix(similarity, order, 3, 0, backend=backend).shape == (3, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter_and_inputs_stay_as_they_are(backend):
    wide = matrix("random", 24, 8, batch=2)
    similarity = wide[:, ::2, ::2]
    weight, selected = (torch.cat([x, x], 1)[:, ::2] for x in draws(12, 8, batch=2))
    before = [x.clone() for x in (wide, weight, selected)]
    expected = farthest_point(
        similarity.clone(), selected.clone(), 6, weight.clone(), backend=backend
    )
    assert torch.equal(farthest_point(similarity, selected, 6, weight, backend=backend), expected)
    shared = similarity[:1].expand(2, -1, -1)
    assert torch.equal(farthest_point(shared, selected, 6, backend=backend)[0], farthest_point(
        similarity[:1], selected[:1], 6, backend=backend)[0])  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, (wide, weight, selected), strict=True))
