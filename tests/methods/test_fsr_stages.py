"""Stages of FSR by themselves: what merging does to rows, whole batches, half precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fsr_vllm import VisualTokens, get_method, prune
from fsr_vllm.methods.fsr import focus, refine, scan
from fsr_vllm.methods.fsr_coverage import coverage_weight, merge_softly, scan_coverage
from fsr_vllm.methods.ops import cosine_similarity

from . import reference
from .default_methods import quick


@given(seed=st.integers(0, 9999))
@example(seed=0)
@quick
def test_refine_does_not_depend_on_order(seed):
    g = torch.Generator().manual_seed(seed)
    n, d, k = 30, 5, 8
    features, phi = torch.randn(1, n, d, generator=g), torch.rand(1, n, generator=g) ** 8
    similarity = cosine_similarity(features)
    indices = torch.randperm(n, generator=g)[:k].sort().values[None]
    is_focus = torch.arange(k)[None] < 3
    out = refine(features, similarity, indices, is_focus, phi, kappa=3.0)
    assert out.num_merged.item() == 15 and torch.equal(out.rows[0, :3], features[0, indices[0, :3]])
    weight = phi[0].double().tolist()
    pairs = [(i, j) for i, j in enumerate(out.merged_into[0].tolist()) if j >= 0]
    for turn in range(3):  # equation (9) one by one, in whatever order
        shuffled = [pairs[p] for p in torch.randperm(len(pairs), generator=g)]
        rows = reference.merge(features[0].double().tolist(), shuffled, weight)
        for row, place in zip(out.rows[0], indices[0].tolist(), strict=True):
            wanted = torch.tensor(rows.get(place, features[0, place].tolist()))
            torch.testing.assert_close(
                row, wanted.float(), rtol=1e-4, atol=1e-5, msg=f"turn {turn}"
            )


def test_refine_with_tiny_and_zero_weights():
    features = torch.tensor([[[2.0, 0.0], [4.0, 0.0], [0.0, 2.0], [0.0, 6.0], [-1.0, 0.0]]])
    phi = torch.tensor([[1e-38, 3e-38, 0.0, 1e-12, 1.0]])
    indices, is_focus = torch.tensor([[0, 2, 4]]), torch.tensor([[False, False, True]])
    similarity = cosine_similarity(features)
    out = refine(features, similarity, indices, is_focus, phi)
    assert out.merged_into.tolist() == [[-1, 0, -1, 2, -1]]
    # 1 : 3 also where the weights are near the end of float32; an anchor of weight 0 takes what
    # comes in; focus stays
    torch.testing.assert_close(out.rows, torch.tensor([[[3.5, 0.0], [0.0, 6.0], [-1.0, 0.0]]]))
    nothing = refine(features, similarity, indices, is_focus, phi * 0.0)
    assert torch.equal(nothing.rows, features[:, [0, 2, 4]]) and nothing.num_merged.item() == 2


def test_half_precision_signals_are_scored_in_float32():
    g = torch.Generator().manual_seed(4)
    features = torch.randn(40, 8, generator=g)
    saliency = torch.rand(40, generator=g).half() / 1000  # near the small end of float16
    relevance = torch.rand(40, generator=g).half()
    a = prune(features, saliency=saliency, relevance=relevance, budget=12, rho=0.5)
    b = prune(features, saliency=saliency.float(), relevance=relevance.float(), budget=12, rho=0.5)
    assert torch.equal(a.indices, b.indices) and torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize("refining", ["phi", "soft"])
@pytest.mark.parametrize("rule", ["farthest", "coverage"])
@pytest.mark.parametrize("limit", ["clamp", "whole"])
def test_stages_on_a_whole_batch_are_those_of_its_images(limit, rule, refining):
    """As on a GPU, where all images step together; one focuses on nothing, one on all of K."""
    b, n, k, g = 5, 21, 8, torch.Generator().manual_seed(5)
    features = torch.randn(b, n, 6, generator=g)
    saliency, relevance = torch.rand(b, n, generator=g), torch.rand(b, n, generator=g)
    saliency[0], relevance[0] = torch.arange(n) < 4, torch.arange(n) >= 4  # all phi are 0
    saliency[1], relevance[1] = torch.arange(n) < 20, 1.0  # K_F = 8, all of K
    method = get_method("fsr", rho=0.4, focus_rule=limit, scan=rule, refine=refining)
    want = method.prune(VisualTokens(features, saliency=saliency, relevance=relevance), k)
    assert want.num_focus[0] == 0 and want.num_focus[1] == k and 0 < want.num_focus[2] < k

    found = focus(saliency, relevance, k, rho=0.4, rule=limit)
    similarity = cosine_similarity(features)
    if rule == "coverage":
        weight = coverage_weight(found.relevance, 0.6, 3.0)
        picks = scan_coverage(similarity, found.order, found.num_focus, weight)
    else:
        picks = scan(similarity, found.order, found.num_focus)
    indices, when = picks.sort(dim=-1)
    is_focus = when < found.num_focus[:, None]
    if refining == "soft":
        out = merge_softly(features, similarity, indices, is_focus, 0.05)
    else:
        out = refine(features, similarity, indices, is_focus, found.phi)
    assert torch.equal(indices, want.indices) and torch.equal(is_focus, want.is_focus)
    assert torch.equal(out.merged_into, want.merged_into)
    assert torch.equal(out.num_merged, want.num_merged)
    torch.testing.assert_close(out.rows, want.tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("refining", ["phi", "soft"])
def test_half_precision_rows_are_merged_in_float32(refining, dtype):
    g = torch.Generator().manual_seed(6)
    features, saliency = torch.randn(60, 16, generator=g).to(dtype), torch.rand(60, generator=g)
    options = {"budget": 6, "kappa": 20.0, "rho": 0.01, "refine": refining}
    half, full = (prune(x, saliency=saliency, **options) for x in (features, features.float()))
    assert half.num_merged > 50 and torch.equal(half.merged_into, full.merged_into)
    assert torch.equal(half.tokens, full.tokens.to(dtype))  # rounded once, at the end
