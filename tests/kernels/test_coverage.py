"""Coverage rounds against the definition; sums are exact, so all implementations agree to the last
tie.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsr_vllm.kernels import coverage_greedy
from fsr_vllm.kernels.grid import snap, snap_weights

from . import oracles
from .oracles import cases, coarse, draws, fractions, lopsided, matrix, quick

BACKENDS = ("reference", "torch", "masked")
switches = st.tuples(*[st.booleans()] * 5)


def options(
    tokens: int, seed: int, batch: int, use: tuple[bool, ...]
) -> dict[str, torch.Tensor | None]:
    """The optional inputs, each present or not."""
    weight, selected = draws(tokens, seed, batch)
    other, _ = draws(tokens, seed + 1, batch)
    values = (weight, other, other.flip(1) - 0.5, weight.flip(1) / 2 - 0.25, selected)
    names = ("row_weight", "candidate_weight", "candidate_bonus", "covered", "selected")
    return {name: value if on else None for name, value, on in zip(names, values, use, strict=True)}


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(cases, fractions, switches)
def test_picks_what_the_definition_says(backend, case, steps, use):
    kind, tokens, seed = case
    similarity = coarse(matrix(kind, tokens, seed), 2**-10)
    extra = options(tokens, seed, 1, use)
    picks = coverage_greedy(similarity, steps, **extra, backend=backend)
    row = {name: None if value is None else value[0] for name, value in extra.items()}
    chosen = [] if row["selected"] is None else row["selected"].nonzero()[:, 0].tolist()
    expected = oracles.coverage(
        similarity[0],
        steps,
        row["row_weight"],
        row["candidate_weight"],
        row["candidate_bonus"],
        row["covered"],
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
    first, *others = (
        coverage_greedy(similarity, steps, **extra, backend=name) for name in BACKENDS
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_bonus_is_picked_first_and_once(backend):
    bonus = torch.zeros(1, 12)
    bonus[0, [7, 3]] = torch.inf
    picks = coverage_greedy(matrix("random", 12, 0), 12, candidate_bonus=bonus, backend=backend)[
        0
    ].tolist()
    assert sorted(picks) == list(range(12)) and sorted(picks[:2]) == [3, 7]


@pytest.mark.parametrize("kind", ["random", "duplicates", "lattice", "ring"])
def test_backends_agree_where_sums_are_long(kind):
    # Many more tokens than a block of rows in cpu.py; the ring and the lattice have ties in
    # different orders of adding.
    similarity = matrix(kind, 300, 3)
    weight = torch.rand(1, 300, generator=torch.Generator().manual_seed(3)) ** 6 * 50
    tenth = torch.full((1, 300), 0.1)
    for rows, candidates, covered in (
        (None, None, tenth),
        (weight, weight, None),
        (tenth, None, weight / 100),
    ):
        first, *others = (
            coverage_greedy(similarity, 30, rows, candidates, covered, backend=name)
            for name in BACKENDS
        )
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("tokens", [2, 9, 40])
def test_backends_read_the_same_rows_of_a_matrix_that_is_not_symmetric(tokens):
    similarity = lopsided(tokens, 1, batch=3)
    _, selected = draws(tokens, 1, batch=3)
    first, *others = (
        coverage_greedy(similarity, tokens, selected=selected, backend=name) for name in BACKENDS
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_row_takes_its_own_number_of_steps(backend):
    similarity = matrix("random", 12, 0, batch=5)
    _, selected = draws(12, 0, batch=5)
    selected[4] = True  # nothing left to add
    picks = coverage_greedy(
        similarity, torch.tensor([0, 3, 7, 99, 4]), selected=selected, max_steps=7, backend=backend
    )
    assert picks.shape == (5, 7) and picks.dtype == torch.int64
    for row, count in enumerate([0, 3, 7, 7, 0]):
        alone = coverage_greedy(
            similarity[row : row + 1], count, selected=selected[row : row + 1], backend=backend
        )
        assert picks[row].tolist() == alone[0].tolist() + [-1] * (7 - count)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", oracles.KINDS)
def test_all_tokens_in_the_end_none_twice(backend, kind):
    zero = torch.zeros(1, 17)
    picks = coverage_greedy(matrix(kind, 17, 1), 17, candidate_weight=zero, backend=backend)
    assert picks.tolist() == [list(range(17))]  # nothing but ties
    assert sorted(coverage_greedy(matrix(kind, 17, 1), 17, backend=backend)[0].tolist()) == list(
        range(17)
    )
    assert coverage_greedy(torch.ones(1, 1, 1), 3, backend=backend).tolist() == [[0, -1, -1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_starting_after_some_picks_continues_them(backend):
    similarity = matrix("clustered", 40, 2)
    whole = coverage_greedy(similarity, 12, backend=backend)
    selected = torch.zeros(1, 40, dtype=torch.bool).scatter(1, whole[:, :5], True)
    assert torch.equal(
        whole[:, 5:], coverage_greedy(similarity, 7, selected=selected, backend=backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter_and_inputs_stay_as_they_are(backend):
    wide = matrix("random", 24, 8, batch=2)
    extra = {
        name: torch.cat([x, x], 1)[:, ::2]
        for name, x in options(12, 8, 2, (True,) * 5).items()
        if x is not None
    }
    before = [wide.clone(), *(x.clone() for x in extra.values())]
    dense = {name: x.clone() for name, x in extra.items()}
    expected = coverage_greedy(wide[:, ::2, ::2].clone(), 6, **dense, backend=backend)
    assert torch.equal(coverage_greedy(wide[:, ::2, ::2], 6, **extra, backend=backend), expected)
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
