"""FSR as served against `reference_served.py`, and what it promises whatever comes in."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fsr_vllm import VisualTokens, get_method, prune
from fsr_vllm.methods.fsr_coverage import coverage_weight, merge_softly
from fsr_vllm.methods.ops import cosine_similarity, cosines_by_halves, minmax

from . import reference_served as reference
from .default_methods import quick

served = get_method("fsr", preset="served")
KINDS = ("random", "clusters", "duplicates", "constant", "zeros", "peaked", "flat")


def image(kind: str, n: int, seed: int, d: int = 8) -> tuple[torch.Tensor, ...]:
    """Features (N, D), saliency and relevance (N,)."""
    g = torch.Generator().manual_seed(seed)
    x, s, r = (
        torch.randn(n, d, generator=g),
        torch.rand(n, generator=g),
        torch.randn(n, generator=g),
    )
    group = torch.randint(max(1, n // 4), (n,), generator=g)
    if kind == "clusters":
        x = 3 * torch.randn(n, d, generator=g)[group] + x
    elif kind == "duplicates":
        x = x[group]
    elif kind == "constant":
        x, s, r = torch.ones(n, d), torch.ones(n), torch.ones(n)
    elif kind == "zeros":
        x[::3], s[:], r[:] = 0, 0, -1
    elif kind == "peaked":  # few tokens hold the mass, so that there is a focus
        s, r = s**8, r.clamp(min=0) + 0.2
    elif kind == "flat":
        s, r = (s * 2).round(), (r > 0).float()
    return x, s, r


def compare(features, saliency, relevance, k, **how):
    """The production result beside the reference's."""
    r = None if relevance is None else relevance.double().numpy()
    want = reference.served(features.double().numpy(), saliency.double().numpy(), r, k, **how)
    names = {"share": "max_focus_share", "mix": "coverage_mix", "gamma": "coverage_gamma"}
    options = {names.get(name, name): value for name, value in how.items()}
    method = get_method("fsr", preset="served", **options)
    got = method.prune(VisualTokens(features, saliency, relevance), k)
    assume(want.tightest > 1e-5)  # below that float32 may decide either way
    assert got.k_focus == want.k_focus and got.num_focus == len(want.focus)
    assert got.indices.tolist() == want.kept
    assert got.is_focus.tolist() == [i in want.focus for i in want.kept]
    assert got.merged_into.tolist() == want.into
    assert got.num_scan == len(want.picks)
    assert got.num_merged == sum(j >= 0 for j in want.into)
    rows = torch.from_numpy(want.rows)
    torch.testing.assert_close(got.tokens.double(), rows, rtol=1e-4, atol=1e-4)
    return got, want


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"rho": 0.3},
        {"rho": 0.3, "share": 1.0, "mix": 1.0},
        {"mix": 0.0},
        {"alpha": 3.0, "gamma": 1.0, "temperature": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["random", "clusters", "peaked"])
@quick
@given(n=st.integers(3, 24), seed=st.integers(0, 9999), data=st.data())
def test_equals_its_description(how, kind, n, seed, data):
    k = data.draw(st.integers(1, n - 1))
    features, saliency, relevance = image(kind, n, seed)
    compare(features, saliency, None if seed % 4 == 0 else relevance, k, **how)


# Cosines are exact in float32, scores span 0..4 and relevance takes two values: exact ties, many.
EXACT = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 0], [-1, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]
EXACT += [[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5]]
rows = st.lists(
    st.tuples(st.sampled_from(EXACT), st.integers(0, 4), st.sampled_from([0, 4])),
    min_size=3,
    max_size=14,
)


@quick
@given(tokens=rows, rho=st.sampled_from([0.2, 0.9]), data=st.data())
def test_every_tie_goes_to_the_lower_index(tokens, rho, data):
    k = data.draw(st.integers(1, len(tokens) - 1))
    tokens = [([1, 0, 0, 0], 0, 4), *tokens[1:-1], ([0, 1, 0, 0], 4, 0)]
    columns = (torch.tensor(column, dtype=torch.float32) for column in zip(*tokens, strict=True))
    compare(*columns, k, rho=rho)


@quick
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 40),
    seed=st.integers(0, 9999),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rho=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    data=st.data(),
)
def test_what_holds_for_every_image(kind, n, seed, dtype, rho, data):
    k = data.draw(st.sampled_from(sorted({1, n, data.draw(st.integers(1, n))})))
    features, saliency, relevance = image(kind, n, seed)
    features = features.to(dtype)
    tokens = VisualTokens(features, saliency, relevance)
    out = dataclasses.replace(served, rho=rho).prune(tokens, k)
    kept = out.indices.tolist()
    assert kept == sorted(set(kept)) and len(kept) == k and out.tokens.shape == (k, 8)
    assert out.tokens.dtype == dtype and out.tokens.isfinite().all()
    if k == n:
        assert torch.equal(out.tokens, features) and out.num_merged == 0
        return
    # Focus: whole, or not at all; its rows are as they were.
    k_focus, num_focus = int(out.k_focus), int(out.num_focus)
    assert num_focus == (k_focus if k_focus <= 0.75 * k else 0) == int(out.is_focus.sum())
    assert torch.equal(out.tokens[out.is_focus], features[out.indices[out.is_focus]])
    # Everything else goes to the anchor that is nearest.
    into = out.merged_into
    assert out.num_merged == n - k == int((into >= 0).sum())
    anchors = out.indices[~out.is_focus]
    assert set(into[into >= 0].tolist()) <= set(anchors.tolist())
    cosine = cosine_similarity(features[None])[0].double()
    for i in (into >= 0).nonzero()[:, 0].tolist():
        assert cosine[i, into[i]] >= cosine[i, anchors].max() - 1e-6
    # Weights add up to 1: of equal rows the mean is that row.
    if kind == "constant":
        torch.testing.assert_close(out.tokens, features[:k])


@quick
@given(n=st.integers(2, 60), seed=st.integers(0, 9999), temperature=st.floats(1e-3, 1e3))
def test_merge_weights(n, seed, temperature):
    """Rows of one-hot features show the weights: own 1, incoming exp((cos - 1) / temperature)."""
    g = torch.Generator().manual_seed(seed)
    features = torch.eye(n)[None]
    x = torch.randn(1, n, 4, generator=g)
    similarity = cosine_similarity(x)
    k = int(torch.randint(1, n, (1,), generator=g))
    indices = torch.randperm(n, generator=g)[:k].sort().values[None]
    is_focus = torch.rand(1, k, generator=g) < 0.4
    out = merge_softly(features, similarity, indices, is_focus, temperature)
    if is_focus.all():
        assert torch.equal(out.rows, features[:, indices[0]]) and out.num_merged == 0
        return
    want = torch.zeros(k, n, dtype=torch.float64)
    for place, j in enumerate(indices[0].tolist()):
        mine = (out.merged_into[0] == j).nonzero()[:, 0]
        want[place, mine] = ((similarity[0, mine, j].double() - 1) / temperature).exp()
        want[place, j] = 1.0
        assert not (is_focus[0, place] and len(mine))
    want /= want.sum(1, keepdim=True)
    torch.testing.assert_close(out.rows[0].double(), want, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(out.rows[0].sum(1), torch.ones(k))
    # Mass: what is kept and what is merged makes the image, each token once.
    assert int((out.rows[0] > 0).sum()) <= n and out.num_merged == n - k


def test_coverage_weight():
    r = torch.tensor([[0.0, 0.5, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    found = coverage_weight(r, 0.6, 3.0).double()
    cubes = torch.tensor([0.0, 0.125, 1.0, 0.0]).double()
    torch.testing.assert_close(found[0], 0.1 + 0.6 * cubes / 1.125, rtol=1e-6, atol=0)
    assert found[1].tolist() == found[2].tolist() == [0.25] * 4  # all zero, or no relevance
    assert coverage_weight(r, 0.0, 3.0).tolist() == [[0.25] * 4] * 3


def test_a_tile_without_relevance_counts_all_its_tokens_alike():
    g = torch.Generator().manual_seed(0)
    features, saliency = torch.randn(2, 20, 6, generator=g), torch.rand(2, 20, generator=g)
    relevance = torch.stack([torch.zeros(20), torch.rand(20, generator=g) + 1])
    grouped = get_method("fsr", preset="served", norm_scope="group")
    group = torch.tensor([3, 3])
    assert minmax(relevance, group)[0].tolist() == [0.0] * 20
    out = grouped.prune(VisualTokens(features, saliency, relevance, group=group), 6)
    assert out.num_focus[0] == 0 and out.k_focus[0] == 0  # every phi is 0
    even = reference.served(features[0], np.ones(20), np.ones(20), 6)
    assert even.tightest > 1e-5 and out.indices[0].tolist() == even.kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 9, 59])
def test_a_batch_is_its_images(k, dtype):
    images = [image(kind, 60, 3) for kind in KINDS]
    x, s, r = (torch.stack(column) for column in zip(*images, strict=True))
    x = x.to(dtype)
    method = dataclasses.replace(served, rho=0.3)  # a focus in some of them
    whole = method.prune(VisualTokens(x, s, r), k)
    assert len({int(count) for count in whole.num_focus}) > (k > 1)
    for b in range(len(images)):
        alone = method.prune(VisualTokens(x[b], s[b], r[b]), k)
        for item in dataclasses.fields(alone):
            assert torch.equal(getattr(whole, item.name)[b], getattr(alone, item.name)), item.name


@pytest.mark.parametrize("refining", ["phi", "soft", "off"])
@pytest.mark.parametrize("rule", ["farthest", "coverage"])
@pytest.mark.parametrize("limit", ["clamp", "whole"])
def test_nothing_is_read_back_from_a_device(limit, rule, refining, monkeypatch):
    # A meta tensor has no values: whatever needs one on the host raises. So a GPU is never waited
    # for, and the shapes do not depend on the data.
    monkeypatch.setenv("FSR_KERNELS", "masked")
    method = get_method("fsr", focus_rule=limit, scan=rule, refine=refining)
    x, s, r = (torch.empty(*shape, device="meta") for shape in ((2, 30, 16), (2, 30), (2, 30)))
    found = method.select(VisualTokens(x, s, r), 7)
    assert found.indices.shape == (2, 7) and found.rows is not None
    assert found.rows.shape == (2, 7, 16) and found.rows.is_meta


@pytest.mark.parametrize("seed", range(6))
def test_greedy_coverage_is_within_its_bound(seed):
    """At least 1 - 1/e of the best set's coverage, found by trying all."""
    x, s, r = image("random", 11, seed)
    method = get_method("fsr", preset="served", max_focus_share=0.0)
    kept = method.prune(VisualTokens(x, s, r), 3).indices.tolist()
    cosine = reference.cosines(x.double().numpy())
    weight = coverage_weight(minmax(r[None]), 0.6, 3.0)[0].double().numpy()

    def value(chosen):
        return float((weight * np.maximum(0, cosine[:, list(chosen)].max(1))).sum())

    best = max(value(chosen) for chosen in combinations(range(11), 3))
    assert value(kept) >= (1 - 1 / np.e) * best


def test_relevance_decides_what_is_scanned():
    """Two like groups: more of the budget goes to the one that the question is about."""
    g = torch.Generator().manual_seed(1)
    x = torch.nn.functional.normalize(torch.randn(40, 64, generator=g), dim=-1)
    s, r = torch.ones(40), torch.zeros(40)
    r[:20] = 1.0
    about, other = (prune(x, saliency=s, relevance=v, budget=10, preset="served") for v in (r, -r))
    assert (about.indices < 20).sum() == 10 and (other.indices >= 20).sum() == 10


@quick
@given(kind=st.sampled_from(KINDS), n=st.integers(1, 300), seed=st.integers(0, 99))
def test_cosines_by_halves(kind, n, seed):
    x = torch.stack([image(kind, n, seed)[0], image("random", n, seed + 1)[0]])
    found, want = cosines_by_halves(x), cosine_similarity(x)
    torch.testing.assert_close(found, want, rtol=0, atol=2e-6)
    assert torch.equal(found[0], cosines_by_halves(x[:1])[0])
    zero = (x == 0).all(-1)
    assert (found[zero] == 0).all() and found.abs().max() <= 1
    same = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") == 0
    assert (found[same & ~zero[:, :, None]] == 1).all()
