"""FSR against the paper's equations as `reference.py` writes them, and what the paper proves or
leaves open.
"""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fsr_vllm import VisualTokens, get_method, prune
from fsr_vllm.methods.fsr import focus, scan
from fsr_vllm.methods.ops import cosine_similarity, minmax

from . import reference
from .default_methods import quick

SETTINGS = [
    {},
    {"rho": 0.5},
    {"rho": 0.0},
    {"rho": 1.0},
    {"rho": 0.5, "kappa": 2.5},
    {"max_focus_share": 0.25},
    {"max_focus_share": 0.0, "kappa": 0.3},
    {"alpha": 0.0, "beta": 2.0, "rho": 0.5},
    {"alpha": 1.5, "beta": 0.0, "rho": 0.5},
    {"rho": 0.5, "refine": "off"},
]
every_setting = pytest.mark.parametrize("options", SETTINGS, ids=str)


def compare(features, saliency, relevance, k, options, rows=True):
    """The production result beside the reference's; returns both."""
    r = None if relevance is None else relevance.double().tolist()
    want = reference.fsr(features.double().tolist(), saliency.double().tolist(), r, k, **options)
    got = prune(features, saliency=saliency, relevance=relevance, budget=k, **options)
    assume(want.tightest > 1e-5)  # below that float32 may decide either way
    assert got.k_focus == want.k_focus and got.num_focus == want.num_focus
    assert got.indices.tolist() == want.indices and got.is_focus.tolist() == want.is_focus
    assert got.num_scan == want.num_scan and got.num_merged == want.num_merged
    assert got.merged_into.tolist() == want.merged_into
    torch.testing.assert_close(
        got.tokens.double(), torch.tensor(want.rows).double(), rtol=1e-4, atol=1e-4
    )
    return got, want


@every_setting
@quick
@given(n=st.integers(3, 20), d=st.integers(2, 6), seed=st.integers(0, 9999), data=st.data())
def test_equations_on_random_inputs(options, n, d, seed, data):
    k = data.draw(st.integers(1, n - 1))
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=g)
    saliency, relevance = torch.rand(n, generator=g), torch.rand(n, generator=g) - 0.5
    compare(features, saliency, None if seed % 4 == 0 else relevance, k, options)


# Features whose cosines, and scores whose products, are exact in float32: many exact ties, all to
# the lower index.
EXACT = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 0], [-1, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]
EXACT += [[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5]]
rows = st.lists(
    st.tuples(st.sampled_from(EXACT), st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=12
)


@every_setting
@quick
@given(tokens=rows, data=st.data())
def test_every_tie_goes_to_the_lower_index(options, tokens, data):
    k = data.draw(st.integers(1, len(tokens) - 1))
    tokens = [
        ([1, 0, 0, 0], 0, 4),
        *tokens[1:-1],
        ([0, 1, 0, 0], 4, 0),
    ]  # the scores span 0..4, so scaling is exact
    features, saliency, relevance = (
        torch.tensor(column, dtype=torch.float32) for column in zip(*tokens, strict=True)
    )
    compare(features, saliency, relevance, k, {"rho": 0.5, **options})


def test_duplicates_are_scanned_last_and_by_index():
    features = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).repeat(
        4, 1
    )  # 20 tokens, 5 different
    saliency = torch.zeros(20)
    saliency[7] = 1.0
    out = prune(features, saliency=saliency, budget=9)
    assert out.num_focus == 1
    assert {i % 5 for i in out.indices.tolist()} == {0, 1, 2, 3, 4}
    assert out.indices.tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
    ]  # once all five are there: the lowest index left


def test_literal_k_focus():
    phi = torch.tensor([[0.5, 0.0, 1.0, 0.25, 0.25]])  # sum 2; by rank 1, 1.5, 1.75, 2, 2
    for rho, wanted in [
        (0.0, 0),
        (0.25, 1),
        (0.5, 1),
        (0.51, 2),
        (0.75, 2),
        (0.76, 3),
        (0.9, 4),
        (1.0, 4),
    ]:
        found = focus(phi, None, 4, rho=rho)
        assert found.k_focus.item() == wanted, rho
        assert focus(phi, None, 2, rho=rho).num_focus.item() == min(wanted, 2)
    assert focus(phi, None, 4).order.tolist() == [[2, 0, 3, 4]]
    for share, wanted in [(0.0, 1), (0.25, 1), (0.6, 2), (0.75, 3)]:
        assert focus(phi, None, 4, rho=1.0, max_focus_share=share).num_focus.item() == wanted
    for share, wanted in [(0.0, 0), (0.75, 0), (0.99, 0), (1.0, 4)]:
        whole = focus(phi, None, 4, rho=1.0, max_focus_share=share, rule="whole")
        assert whole.num_focus.item() == wanted and whole.k_focus.item() == 4
    for budget, wanted in [(5, 0), (6, 4), (7, 4)]:  # 4 of at most 0.75 of K
        six = torch.tensor([[0.5, 0.0, 1.0, 0.25, 0.25, 0.0, 0.0, 0.0]])
        whole = focus(six, None, budget, rho=1.0, max_focus_share=0.75, rule="whole")
        assert whole.num_focus.item() == wanted, budget
    wide = torch.rand(1, 150, generator=torch.Generator().manual_seed(0))
    assert focus(wide, None, 100, rho=1.0, max_focus_share=0.29).num_focus.item() == 29


@given(n=st.integers(2, 200), seed=st.integers(0, 9999), rho=st.sampled_from([0.1, 0.5, 0.9, 1.0]))
@quick
def test_focus_holds_its_share_and_no_token_too_many(n, seed, rho):
    saliency = torch.rand(1, n, generator=torch.Generator().manual_seed(seed)) ** 4
    found = focus(saliency, None, n - 1, rho=rho)
    ranked = found.phi[0].double().sort(descending=True).values
    k = found.k_focus.item()
    assert (
        ranked[:k].sum() >= rho * ranked.sum() - 1e-9 and ranked[: k - 1].sum() < rho * ranked.sum()
    )


def test_when_all_phi_are_zero_the_most_salient_token_starts_the_scan():
    features = torch.eye(6)[[0, 0, 1, 1, 2, 3]]
    saliency = torch.tensor([0.0, 0.0, 3.0, 5.0, 5.0, 1.0])
    relevance = torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    out = prune(features, saliency=saliency, relevance=relevance, budget=3)
    assert out.k_focus == 0 and out.num_focus == 0 and out.num_scan == 3 and not out.is_focus.any()
    assert out.indices.tolist() == [
        0,
        3,
        4,
    ]  # 3 first, then 0 (the lowest of those at distance 1), then 4
    assert out.merged_into.tolist() == [-1, 0, 3, -1, -1, 0] and out.num_merged == 3
    assert torch.equal(out.tokens, features[out.indices])  # their weights are 0: anchors stay
    one = prune(features, saliency=saliency, relevance=relevance, budget=1)
    assert one.indices.tolist() == [3] and one.num_scan == 1


def test_constant_scores_are_neutral():
    features, one = torch.eye(8), torch.ones(8)
    assert torch.equal(minmax(one[None] * 3), one[None])
    out = prune(features, saliency=one * 3, relevance=-one, budget=4, rho=0.5)
    assert out.k_focus == 4 and out.indices.tolist() == [0, 1, 2, 3]
    assert prune(features, saliency=one * 3, budget=3).k_focus == 8  # 0.9 of 8


def test_without_relevance_it_counts_as_one():
    g = torch.Generator().manual_seed(1)
    features, saliency = torch.randn(20, 4, generator=g), torch.rand(20, generator=g)
    a = prune(features, saliency=saliency, budget=9, rho=0.4)
    b = prune(features, saliency=saliency, relevance=torch.full((20,), 7.0), budget=9, rho=0.4)
    c = prune(features, saliency=saliency, relevance=torch.rand(20), budget=9, rho=0.4, alpha=0.0)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.tokens, c.tokens)


def test_focus_that_fills_the_budget_leaves_nothing_to_scan_or_merge():
    features = torch.randn(10, 3)
    out = prune(features, saliency=torch.linspace(1, 2, 10), budget=3)
    assert out.k_focus > 3 and out.num_focus == 3 and out.num_scan == 0 and out.num_merged == 0
    assert (
        torch.equal(out.tokens, features[7:])
        and out.is_focus.all()
        and (out.merged_into == -1).all()
    )


@pytest.mark.parametrize(
    ("kappa", "merged"),
    [(0.0, 0), (0.09, 0), (0.1, 1), (0.3, 2), (0.5, 3), (1.0, 5), (3.0, 14), (1e6, 14)],
)
def test_number_of_merged_tokens(kappa, merged):
    g = torch.Generator().manual_seed(2)
    saliency = torch.zeros(20)
    saliency[0] = 1.0  # one focus token, so of K = 6 the scan has 5
    out = prune(torch.randn(20, 8, generator=g), saliency=saliency, budget=6, kappa=kappa)
    assert out.num_scan == 5 and out.num_merged == merged


def test_groups_are_scaled_jointly():
    saliency = torch.tensor([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0], [0.0, 1.0, 2.0]])
    joint = minmax(saliency, torch.tensor([7, 7, 3]))
    assert joint.tolist() == [[0.0, 0.25, 0.5], [0.5, 0.75, 1.0], [0.0, 0.5, 1.0]]
    constant = minmax(torch.ones(2, 3), torch.tensor([1, 1]))
    assert constant.tolist() == [[1.0] * 3] * 2
    features = torch.randn(3, 3, 4)
    grouped = get_method("fsr", norm_scope="group", rho=0.8)
    by_group = grouped.prune(
        VisualTokens(features, saliency=saliency, group=torch.tensor([7, 7, 3])), 2
    )
    by_row = grouped.prune(
        VisualTokens(features, saliency=saliency), 2
    )  # no group: every row is its own
    assert by_group.k_focus.tolist() == [2, 3, 2] and by_row.k_focus.tolist() == [2, 2, 2]
    both = focus(
        torch.ones(3, 3), saliency, 2, alpha=1.0, group=torch.tensor([7, 7, 3])
    )  # relevance too
    assert both.phi.tolist() == joint.tolist()
    for wrong in (torch.tensor([1, 2]), torch.tensor([1.0, 2.0, 3.0])):
        with pytest.raises(ValueError, match="^group must hold one integer"):
            grouped.prune(VisualTokens(features, saliency=saliency, group=wrong), 2)


def radius(unit: torch.Tensor, centres: list[int]) -> float:
    """Largest chord from any token to its nearest centre."""
    chord = (2.0 - 2.0 * unit @ unit[centres].T).clamp(min=0).sqrt()
    return float(chord.min(1).values.max())


@pytest.mark.parametrize("seed", range(12))
def test_scan_covers_within_twice_the_best(seed):
    g = torch.Generator().manual_seed(seed)
    n, num_focus, rounds = 9 + seed % 3, seed % 3 + 1, 2 + seed % 2
    unit = torch.nn.functional.normalize(torch.randn(n, 3, generator=g).double(), dim=-1)
    order = torch.randperm(n, generator=g)[None, : num_focus + rounds]
    picks = scan(cosine_similarity(unit[None]), order, torch.tensor([num_focus]))[0].tolist()
    fixed = order[0, :num_focus].tolist()
    assert picks[:num_focus] == fixed and len(set(picks)) == num_focus + rounds
    best = min(radius(unit, fixed + list(more)) for more in combinations(range(n), rounds))
    assert radius(unit, picks) <= 2 * best + 1e-6


def test_scan_looks_at_focus_too():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.2]])
    picks = scan(cosine_similarity(features[None]), torch.tensor([[0, 1, 2]]), torch.tensor([2]))
    assert picks.tolist() == [[0, 1, 3]]
