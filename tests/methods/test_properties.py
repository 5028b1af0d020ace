"""What every method promises, whichever it is."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .default_methods import CASES, Case, each_field, image, make_tokens, permuted, quick

every_case = pytest.mark.parametrize("case", CASES, ids=str)
sizes = st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))
seeds = st.integers(0, 10_000)


def check(out, tokens, k):
    """The shape of every answer: exactly k places, ascending, unique, and counts that agree with
    the flags.
    """
    b, n, d = tokens.features.shape
    assert out.tokens.shape == (b, k, d) and out.tokens.dtype == tokens.features.dtype
    assert torch.isfinite(out.tokens).all()
    assert out.indices.shape == (b, k) and out.indices.dtype == torch.int64
    assert out.indices.min() >= 0 and out.indices.max() < n and (out.indices.diff(dim=1) > 0).all()
    assert out.is_focus.shape == (b, k) and out.is_focus.dtype == torch.bool
    assert out.merged_into.shape == (b, n) and out.merged_into.dtype == torch.int64
    for count in (out.k_focus, out.num_focus, out.num_scan, out.num_merged):
        assert count.shape == (b,) and count.dtype == torch.int64
    assert (
        torch.equal(out.num_focus, out.is_focus.sum(1))
        and ((out.num_focus + out.num_scan) == k).all()
    )
    assert torch.equal(out.num_merged, (out.merged_into >= 0).sum(1))
    for kept, target in zip(out.indices.tolist(), out.merged_into.tolist(), strict=True):
        assert {t for t in target if t >= 0} <= set(kept)  # merged into a kept token
        assert all(target[place] == -1 for place in kept)  # which itself is not merged


def same(a, b):
    return all(torch.equal(getattr(a, item.name), getattr(b, item.name)) for item in fields(a))


@every_case
@quick
@given(size=sizes, seed=seeds)
def test_exactly_k_tokens_in_order(case: Case, size, seed):
    n, k = size
    tokens = make_tokens(case.method(), n, seed=seed)
    check(case.method().prune(tokens, k), tokens, k)


@every_case
@quick
@given(size=sizes, seed=seeds)
def test_again_gives_the_same(case: Case, size, seed):
    n, k = size
    tokens = make_tokens(case.method(), n, seed=seed)
    before = each_field(tokens, torch.clone)
    first = case.method().prune(tokens, k)
    assert same(first, case.method().prune(tokens, k, validate=False))
    for item in fields(tokens):  # and inputs are left alone
        value = getattr(tokens, item.name)
        assert not isinstance(value, torch.Tensor) or torch.equal(value, getattr(before, item.name))


@every_case
@quick
@given(size=sizes, seed=seeds, batch=st.integers(1, 4))
def test_a_batch_is_its_images(case: Case, size, seed, batch):
    n, k = size
    tokens = make_tokens(case.method(), n, batch=batch, seed=seed)
    together = case.method().prune(tokens, k)
    for b in range(batch):
        alone = case.method().prune(image(tokens, b), k)
        for item in fields(together):
            assert torch.equal(getattr(together, item.name)[b], getattr(alone, item.name)), (
                item.name
            )


@pytest.mark.parametrize("case", [case for case in CASES if case.equivariant], ids=str)
@quick
@given(k=st.integers(1, 22), seed=seeds)
def test_order_of_tokens_does_not_matter(case: Case, k, seed):
    n = 23
    tokens = make_tokens(case.method(), n, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    out, moved = case.method().prune(tokens, k), case.method().prune(permuted(tokens, order), k)
    place, back = order[moved.indices].sort(dim=-1)
    assert torch.equal(place, out.indices)
    torch.testing.assert_close(
        moved.tokens.gather(1, back[..., None].expand_as(moved.tokens)), out.tokens
    )


@every_case
@pytest.mark.parametrize("over", [0, 1, 1000])
def test_a_budget_of_n_or_more_changes_nothing(case: Case, over):
    tokens = make_tokens(case.method(), 12)
    out = case.method().prune(tokens, 12 + over)
    check(out, tokens, 12)
    assert out.tokens is tokens.features
    assert out.is_focus.all() and (out.merged_into == -1).all()
    single = case.method().prune(image(tokens, 1), 12 + over)
    assert torch.equal(single.tokens, tokens.features[1]) and single.k_focus.dim() == 0


@every_case
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_dtype_is_kept_and_unmerged_rows_are_untouched(case: Case, dtype):
    tokens = make_tokens(case.method(), 30, d=16, dtype=dtype)
    out = case.method().prune(tokens, 7)
    check(out, tokens, 7)
    if case.plain:
        for b in range(2):
            merged = set(out.merged_into[b].tolist())
            for row, place in zip(out.tokens[b], out.indices[b].tolist(), strict=True):
                assert place in merged or torch.equal(row, tokens.features[b, place])


@every_case
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("which", ["features", "signals", "all"])
def test_constant_inputs(case: Case, k, value, which):
    tokens = make_tokens(case.method(), 17)
    constant = each_field(tokens, lambda x: torch.full_like(x, value))
    if which == "features":
        tokens = replace(tokens, features=constant.features)
    else:
        tokens = constant if which == "all" else replace(constant, features=tokens.features)
    check(case.method().prune(tokens, k), tokens, k)


@every_case
@pytest.mark.parametrize("n", [2, 3, 7, 13, 24, 31])
def test_one_token_of_any_number(case: Case, n):
    tokens = make_tokens(case.method(), n)
    check(case.method().prune(tokens, 1), tokens, 1)
    check(case.method().prune(tokens, n - 1), tokens, n - 1)


@every_case
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_are_named(case: Case, bad):
    tokens = make_tokens(case.method(), 12)
    for name in ("features", *case.method().needs, *case.method().uses):
        value = getattr(tokens, name)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            spoilt = value.clone()
            spoilt.view(-1)[-1] = bad
            with pytest.raises(ValueError, match=f"^{name} holds NaN or Inf"):
                case.method().prune(replace(tokens, **{name: spoilt}), 5)


@every_case
def test_wrong_shapes_and_missing_signals_are_named(case: Case):
    method = case.method()
    tokens = make_tokens(method, 12)
    for name in dict.fromkeys((*method.needs, *method.uses)):
        value = getattr(tokens, name)
        if isinstance(value, torch.Tensor):
            with pytest.raises(ValueError, match=f"^{name} must "):
                method.prune(replace(tokens, **{name: value[:, None, None, None]}), 5)
            with pytest.raises(ValueError, match=f"^{name} must "):
                method.prune(replace(tokens, **{name: value.tolist()}), 5)
        if name in method.needs:
            with pytest.raises(ValueError, match=f"^{name} is needed"):
                method.prune(replace(tokens, **{name: None}), 5)


@every_case
def test_signals_that_are_not_declared_are_ignored(case: Case):
    method = case.method()
    tokens = make_tokens(method, 12)
    known = {"features", *method.needs, *method.uses}
    noise = {item.name: "nonsense" for item in fields(tokens) if item.name not in known}
    assert same(method.prune(tokens, 5), method.prune(replace(tokens, **noise), 5))


@every_case
@pytest.mark.parametrize("budget", [0, -1, True, 1.0, 2.5, "3", None])
def test_budgets_that_are_refused(case: Case, budget):
    with pytest.raises(ValueError, match="^budget must be an integer from 1 to 1,000,000"):
        case.method().prune(make_tokens(case.method(), 12), budget)


@every_case
def test_nothing_waits_for_the_device(case: Case, monkeypatch):
    """Tensors without values stand for a GPU whose values have not arrived: reading one back is an
    error.
    """
    monkeypatch.delenv("FSR_KERNELS", raising=False)
    method = case.method()
    tokens = make_tokens(method, 36, batch=3)
    there = each_field(tokens, lambda value: value.to("meta"))
    if tokens.group is not None:
        there.group = tokens.group.to("meta")
    for k in (1, 9, 36):
        here, out = method.prune(tokens, k), method.prune(there, k, validate=False)
        for item in fields(out):
            a, b = getattr(here, item.name), getattr(out, item.name)
            assert b.device.type == "meta" and a.shape == b.shape and a.dtype == b.dtype, item.name
    with pytest.raises((RuntimeError, NotImplementedError)):
        method.prune(there, 9)  # looking for NaN does wait
