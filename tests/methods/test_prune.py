"""`fsr_vllm.prune`: its signals, budgets, presets and options; and one image of what it returns."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch

import fsr_vllm
from fsr_vllm.methods import SERVED_DEFAULTS, PrunedTokens, VisualTokens, get_method, list_methods
from fsr_vllm.params import build_method

from .default_methods import make_tokens


def same(a: PrunedTokens, b: PrunedTokens) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(PrunedTokens))


def given(tokens: VisualTokens) -> dict:
    named = {item.name: getattr(tokens, item.name) for item in fields(tokens)}
    return {name: value for name, value in named.items() if value is not None}


@pytest.mark.parametrize("name", list_methods())
def test_every_field_reaches_the_method(name):
    method = get_method(name)
    tokens = make_tokens(method, 12)
    assert same(fsr_vllm.prune(**given(tokens), budget=5, method=name), method.prune(tokens, 5))


def test_options_and_fields_are_told_apart_by_name():
    tokens = make_tokens(get_method("fsr"), 12)
    direct = get_method("fsr", rho=0.3, norm_scope="group").prune(tokens, 5)
    out = fsr_vllm.prune(**given(tokens), budget=5, rho=0.3, norm_scope="group")
    assert same(out, direct)
    with pytest.raises(ValueError, match="has no option 'metrics'"):
        fsr_vllm.prune(tokens.features, saliency=tokens.saliency, budget=5, metrics=None)


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (7, 7), (7.0, 7), (np.int64(7), 7), (1, 1), (60, 60), (61, 60), (1_000_000, 60),
        (0.5, 30), (0.0001, 1), (0.999, 60), (0.125, math.floor(0.125 * 60 + 0.5)),
        (np.float32(0.25), 15), ("off", 60),
    ],
)  # fmt: skip
def test_budgets_are_those_of_requests(budget, kept):
    features, saliency = torch.randn(60, 4), torch.rand(60)
    out = fsr_vllm.prune(features, saliency=saliency, budget=budget)
    assert out.tokens.shape == (kept, 4)
    assert same(out, get_method("fsr").prune(VisualTokens(features, saliency=saliency), kept))
    if kept == 60:
        assert torch.equal(out.tokens, features)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (1.0, 'got 1.0, which could mean one token or the whole image: write 1 or "off"'),
        (True, "got True"), (math.nan, "got nan"), (math.inf, "got inf"), (-0.5, "got -0.5"),
        ("0.5", "got '0.5'"), ("OFF", "got 'OFF'"), ([5], r"got \[5\]"), (1_000_001, "got 1000001"),
    ],
)  # fmt: skip
def test_other_budgets_are_refused_with_what_is_allowed(budget, said):
    with pytest.raises(ValueError, match=f'^budget must be an integer .* or "off"; {said}'):
        fsr_vllm.prune(torch.ones(9, 2), saliency=torch.ones(9), budget=budget)


@pytest.mark.parametrize("name", [name for name, info in list_methods().items() if info.servable])
@pytest.mark.parametrize("preset", ["paper", "served"])
def test_a_preset_is_what_a_server_runs(name, preset):
    tokens, served = make_tokens(get_method(name), 49), build_method(name, {"preset": preset})
    out = fsr_vllm.prune(**given(tokens), budget=12, method=name, preset=preset)
    assert same(out, served.prune(tokens, 12))
    assert build_method(name, None) == build_method(name, {"preset": "served"})


def test_presets_differ_and_options_change_them():
    tokens = make_tokens(get_method("fsr"), 49)
    paper, served = (
        fsr_vllm.prune(**given(tokens), budget=12, preset=preset) for preset in ("paper", "served")
    )
    assert same(paper, fsr_vllm.prune(**given(tokens), budget=12))
    assert not torch.equal(paper.indices, served.indices)
    changed = get_method("fsr", preset="served", rho=0.3)
    assert changed == get_method("fsr", **{**SERVED_DEFAULTS["fsr"], "rho": 0.3})
    for wrong in ("published", "", None, 1):
        with pytest.raises(ValueError, match='^preset must be "paper" or "served"; got '):
            fsr_vllm.prune(**given(tokens), budget=12, preset=wrong)


@pytest.mark.parametrize("budget", [5, "off"])
def test_one_image_of_a_batch(budget):
    tokens = make_tokens(get_method("fsr"), 20, batch=3)
    batch = get_method("fsr", rho=0.5).prune(tokens, budget)
    k = 5 if budget == 5 else 20
    shapes = dict.fromkeys((item.name for item in fields(PrunedTokens)), ())
    shapes |= {"tokens": (k, 6), "indices": (k,), "is_focus": (k,), "merged_into": (20,)}
    for b in range(3):
        one = batch.of(b)
        assert {name: tuple(getattr(one, name).shape) for name in shapes} == shapes
        for name in shapes:
            own, whole = getattr(one, name), getattr(batch, name)
            assert torch.equal(own, whole[b])
            assert own.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()  # a view
    with pytest.raises(ValueError, match="of a batch"):
        batch.of(0).of(0)
    with pytest.raises(IndexError):
        batch.of(3)


def test_one_image_is_cut_without_a_wait_for_the_device():
    tokens = make_tokens(get_method("fsr"), 20, batch=2)
    there = VisualTokens(**{name: value.to("meta") for name, value in given(tokens).items()})
    one = get_method("fsr").prune(there, 5, validate=False).of(1)
    assert one.tokens.shape == (5, 6)
    assert one.num_scan.is_meta
