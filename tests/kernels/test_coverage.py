"""Coverage rounds against the definition; sums are exact, so all agree to the last tie."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsr_vllm.kernels import coverage_greedy
from fsr_vllm.kernels.grid import SHIFT, snap, snap_weights

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


@quick
@given(st.integers(1, 300), st.integers(0, 999), st.sampled_from([0.0, 1.0, 12.0, 1000.0]))
def test_weights_are_rounded_to_a_share_of_their_sum(tokens, seed, power):
    generator = torch.Generator().manual_seed(seed)
    # Flat, or one token that outweighs all others; large and small as a whole.
    weights = torch.rand(3, tokens, generator=generator) ** power + 1e-30
    weights *= torch.tensor([[1.0], [1e-6], [300.0]])
    heavy, total = snap_weights(weights), weights.double().sum(1, keepdim=True)
    step = 2.0 ** (total.log2().floor() + 1 - 28)  # at most: from a power of two on it is half
    assert ((heavy.double() - weights.double()).abs() <= step / 2).all()
    assert torch.equal((heavy.double() / step * 2).round() * step / 2, heavy.double())
    order = torch.randperm(tokens, generator=generator)
    assert torch.equal(snap_weights(weights[:, order]), heavy[:, order])
    assert snap_weights(torch.zeros(1, tokens)).tolist() == [[0.0] * tokens]


@pytest.mark.parametrize("tokens", [4096, 16_384, 2**17])
@pytest.mark.parametrize("power", [0.0, 1.0, 30.0])
def test_sums_are_exact_for_any_number_of_tokens(tokens, power):
    """Every order of adding gives the same float64, and it is the sum of the integers."""
    generator = torch.Generator().manual_seed(tokens)
    values = SHIFT + snap(torch.rand(1, tokens, generator=generator) * 4)  # as the CPU adds them
    heavy = snap_weights(torch.rand(1, tokens, generator=generator) ** power + 1e-4)
    products = (heavy.double() * values.double())[0]
    shuffled = products[torch.randperm(tokens, generator=generator)]
    assert products.sum() == shuffled.cumsum(0)[-1] == products.flip(0).cumsum(0)[-1]
    unit = 2.0 ** math.ceil(math.log2(float(heavy.double().sum()))) * 2.0**-29
    integers = (heavy.double() / unit).long()[0] * (values.double() * 2**20).long()[0]
    assert torch.equal((heavy.double() / unit).round(), heavy.double() / unit)
    assert float(products.sum()) == int(integers.sum()) * unit * 2.0**-20


def full_greedy(similarity, steps, weight, chosen=()):
    """Every gain anew for every pick, in integers: what incremental gains must come to."""
    sim = (snap(similarity).double() * 2**20).long()
    heavy = snap_weights(weight[None])[0].double()
    units = (heavy / 2.0 ** math.floor(math.log2(float(heavy.sum()))) * 2**29).long()
    taken = list(chosen)
    cover = torch.cat([sim[taken], torch.zeros_like(sim[:1])]).amax(0)
    for _ in range(min(steps, len(sim) - len(taken))):
        gain = torch.zeros(len(sim), dtype=torch.int64)
        for start in range(0, len(sim), 512):
            part = slice(start, start + 512)
            rise = (sim[part] - cover[part, None]).clamp_min(0)
            gain += (rise * units[part, None]).sum(0)
        gain[taken] = -1
        taken.append(oracles.first_best(gain))
        cover = torch.maximum(cover, sim[taken[-1]])
    return taken[len(chosen) :]


@quick
@given(cases, fractions, st.sampled_from(["flat", "random", "spiked", "ties"]), st.booleans())
def test_incremental_gains_are_those_of_a_full_greedy(case, steps, how, begun):
    kind, tokens, seed = case
    similarity, generator = matrix(kind, tokens, seed), torch.Generator().manual_seed(seed)
    noise = torch.rand(1, tokens, generator=generator)
    weight = {
        "flat": torch.full((1, tokens), 1 / 3),
        "random": noise,
        "spiked": 1e-4 + noise**40,
        "ties": (noise * 3).ceil() / 7,
    }[how]
    _, selected = draws(tokens, seed)
    chosen = selected[0].nonzero()[:, 0].tolist() if begun else []
    want = full_greedy(similarity[0], steps, weight[0], chosen)
    for backend in ("torch", "masked"):
        got = coverage_greedy(
            similarity, steps, weight, selected=selected if begun else None, backend=backend
        )
        assert got[0].tolist() == want + [-1] * (steps - len(want)), backend


def test_incremental_gains_stay_exact_beyond_4096_tokens():
    """Many rows rise by little at each pick: where sums were rounded, gains would drift."""
    tokens, generator = 4500, torch.Generator().manual_seed(5)
    x = torch.randn(tokens // 3, 16, generator=generator).repeat(3, 1)  # every token three times
    x = torch.nn.functional.normalize(x + 1, dim=-1)
    weight = torch.rand(tokens // 3, generator=generator).pow(9).repeat(3) + 1e-5
    similarity = x @ x.T
    similarity = similarity.tril() + similarity.tril(-1).T
    want = full_greedy(similarity, 12, weight)
    assert coverage_greedy(similarity[None], 12, weight[None], backend="torch")[0].tolist() == want
