"""Coverage rounds against the definition; sums are exact, so all agree to the last tie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsr_vllm.kernels.grid import snap, snap_weights

from . import oracles
from .oracles import cases, coarse, draws, each, fractions, lopsided, matrix, quick

LOOPS = oracles.implementations("coverage_greedy")
every_loop = each(LOOPS)
switches = st.tuples(*[st.booleans()] * 4)


def options(
    tokens: int, seed: int, batch: int, use: tuple[bool, ...]
) -> dict[str, torch.Tensor | None]:
    """The optional inputs, each present or not."""
    weight, selected = draws(tokens, seed, batch)
    other, _ = draws(tokens, seed + 1, batch)
    values = (weight, other, other.flip(1) - 0.5, selected)
    names = ("row_weight", "candidate_weight", "candidate_bonus", "selected")
    return {name: value if on else None for name, value, on in zip(names, values, use, strict=True)}


@every_loop
@quick
@given(cases, fractions, switches)
def test_picks_what_the_definition_says(loop, case, steps, use):
    kind, tokens, seed = case
    similarity = coarse(matrix(kind, tokens, seed), 2**-10)
    extra = options(tokens, seed, 1, use)
    picks = loop(similarity, steps, **extra)
    row = {name: None if value is None else value[0] for name, value in extra.items()}
    chosen = [] if row["selected"] is None else row["selected"].nonzero()[:, 0].tolist()
    expected = oracles.coverage(
        similarity[0],
        steps,
        row["row_weight"],
        row["candidate_weight"],
        row["candidate_bonus"],
        chosen,
    )
    assert picks[0].tolist() == expected + [-1] * (steps - len(expected))


@quick
@given(cases, fractions, switches)
def test_backends_agree_on_unrounded_inputs(case, steps, use):
    kind, tokens, seed = case
    similarity = matrix(kind, tokens, seed, batch=2)
    noise = torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed))
    extra = {
        name: value if value is None or name == "selected" else value * noise * 3
        for name, value in options(tokens, seed, 2, use).items()
    }
    first, *others = (loop(similarity, steps, **extra) for loop in LOOPS.values())
    assert all(torch.equal(first, other) for other in others)


@every_loop
def test_an_infinite_bonus_is_picked_first_and_once(loop):
    bonus = torch.zeros(1, 12)
    bonus[0, [7, 3]] = torch.inf
    picks = loop(matrix("random", 12, 0), 12, candidate_bonus=bonus)[0].tolist()
    assert sorted(picks) == list(range(12)) and sorted(picks[:2]) == [3, 7]


@pytest.mark.parametrize("kind", ["random", "duplicates", "lattice", "ring"])
def test_backends_agree_where_sums_are_long(kind):
    # Many more tokens than a block of rows in cpu.py; the ring and the lattice have ties in
    # different orders of adding.
    similarity = matrix(kind, 300, 3)
    weight = torch.rand(1, 300, generator=torch.Generator().manual_seed(3)) ** 6 * 50
    tenth = torch.full((1, 300), 0.1)
    for rows, candidates in ((None, None), (weight, weight), (tenth, None)):
        first, *others = (loop(similarity, 30, rows, candidates) for loop in LOOPS.values())
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("tokens", [2, 9, 40])
def test_backends_read_the_same_rows_of_a_matrix_that_is_not_symmetric(tokens):
    similarity = lopsided(tokens, 1, batch=3)
    _, selected = draws(tokens, 1, batch=3)
    first, *others = (loop(similarity, tokens, selected=selected) for loop in LOOPS.values())
    assert all(torch.equal(first, other) for other in others)


@every_loop
def test_each_row_takes_its_own_number_of_steps(loop):
    similarity = matrix("random", 12, 0, batch=5)
    _, selected = draws(12, 0, batch=5)
    selected[4] = True  # nothing left to add
    picks = loop(similarity, torch.tensor([0, 3, 7, 99, 4]), selected=selected, max_steps=7)
    assert picks.shape == (5, 7) and picks.dtype == torch.int64
    for row, count in enumerate([0, 3, 7, 7, 0]):
        alone = loop(similarity[row : row + 1], count, selected=selected[row : row + 1])
        assert picks[row].tolist() == alone[0].tolist() + [-1] * (7 - count)


@every_loop
@pytest.mark.parametrize("kind", oracles.KINDS)
def test_all_tokens_in_the_end_none_twice(loop, kind):
    zero = torch.zeros(1, 17)
    picks = loop(matrix(kind, 17, 1), 17, candidate_weight=zero)
    assert picks.tolist() == [list(range(17))]  # nothing but ties
    assert sorted(loop(matrix(kind, 17, 1), 17)[0].tolist()) == list(range(17))
    assert loop(torch.ones(1, 1, 1), 3).tolist() == [[0, -1, -1]]


@every_loop
def test_starting_after_some_picks_continues_them(loop):
    similarity = matrix("clustered", 40, 2)
    whole = loop(similarity, 12)
    selected = torch.zeros(1, 40, dtype=torch.bool).scatter(1, whole[:, :5], True)
    assert torch.equal(whole[:, 5:], loop(similarity, 7, selected=selected))


@every_loop
def test_strides_do_not_matter_and_inputs_stay_as_they_are(loop):
    wide = matrix("random", 24, 8, batch=2)
    extra = {
        name: torch.cat([x, x], 1)[:, ::2]
        for name, x in options(12, 8, 2, (True,) * 4).items()
        if x is not None
    }
    before = [wide.clone(), *(x.clone() for x in extra.values())]
    dense = {name: x.clone() for name, x in extra.items()}
    expected = loop(wide[:, ::2, ::2].clone(), 6, **dense)
    assert torch.equal(loop(wide[:, ::2, ::2], 6, **extra), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, [wide, *extra.values()], strict=True))


def test_the_grid_is_exact():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(4096, generator=generator) * 4 - 2
    snapped = snap(values)
    assert (snapped - values).abs().max() <= 2**-21
    assert torch.equal(snapped.double() * 2**20, (snapped.double() * 2**20).round())
    weights = torch.rand(3, 4096, generator=generator) * torch.tensor([[1.0], [1e-6], [300.0]])
    heavy = snap_weights(weights)
    assert ((heavy - weights).abs().amax(1) <= weights.amax(1) * 2**-20).all()
    # Adding in any order gives the same float64.
    products = heavy.double() * snapped.clamp_min(0).double()
    shuffled = products[:, torch.randperm(4096, generator=generator)]
    assert products.sum(1).tolist() == shuffled.cumsum(1)[:, -1].tolist()
    assert snap_weights(torch.zeros(1, 3)).tolist() == [[0.0, 0.0, 0.0]]
