"""Which implementation runs, what is refused, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fsr_vllm.kernels import (
    backend_for,
    coverage_greedy,
    dpp_greedy,
    farthest_from_prefix,
)

from .oracles import matrix

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_device_and_the_size_choose(monkeypatch):
    monkeypatch.delenv("FSR_KERNELS", raising=False)
    monkeypatch.setattr("fsr_vllm.kernels.dispatch._has_triton", lambda: True)
    assert backend_for(CPU, 576) == "cpu"
    assert backend_for(GPU, 576) == backend_for(GPU, 4096) == "triton"
    assert backend_for(GPU, 4097) == backend_for(torch.device("xpu"), 576) == "masked"
    assert backend_for(GPU, 576, "torch") == "masked"
    assert backend_for(CPU, 9999, "masked") == "masked"
    monkeypatch.setattr("fsr_vllm.kernels.dispatch._has_triton", lambda: False)
    assert backend_for(GPU, 576) == "masked"


def test_the_environment_is_asked_unless_the_call_says(monkeypatch):
    monkeypatch.setenv("FSR_KERNELS", "masked")
    assert backend_for(CPU, 10) == "masked"
    assert backend_for(CPU, 10, "torch") == "cpu"
    monkeypatch.setenv("FSR_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast'.*auto, torch, masked, triton"):
        dpp_greedy(torch.eye(3)[None], 2)
    with pytest.raises(ValueError, match="4096 tokens"):
        backend_for(GPU, 5000, "triton")


def test_importing_needs_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import fsr_vllm.kernels as k;"
        "k.dpp_greedy(torch.eye(3)[None], 2);"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "assert not new & {'triton', 'vllm', 'transformers'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_does_not_fit_is_refused_by_name():
    similarity = matrix("random", 6, 0, batch=2)
    none = torch.zeros(2, 6, dtype=torch.bool)
    order = torch.arange(6).expand(2, 6)
    bad = [
        ("similarity must have shape", lambda: farthest_from_prefix(similarity[0], order, 1, 2)),
        ("similarity must have shape", lambda: coverage_greedy(similarity[:, :4], 2)),
        ("similarity must have shape", lambda: coverage_greedy(similarity[:, :0, :0], 2)),
        ("kernel must be float32", lambda: dpp_greedy(similarity.double(), 2)),
        ("selected must be torch.bool", lambda: coverage_greedy(similarity, 2, selected=order)),
        ("selected must have shape", lambda: coverage_greedy(similarity, 2, selected=none[:1])),
        (
            "row_weight must have shape",
            lambda: coverage_greedy(similarity, 2, torch.ones(2, 6, 1)),
        ),
        (
            "row_weight must have shape .* on cpu",
            lambda: coverage_greedy(similarity, 2, none.float().to("meta")),
        ),
        ("row_weight must be torch.float32", lambda: coverage_greedy(similarity, 2, none.double())),
        ("max_steps", lambda: coverage_greedy(similarity, torch.tensor([1, 2]))),
        ("max_steps", lambda: coverage_greedy(similarity, -1)),
        ("steps must not be negative", lambda: coverage_greedy(similarity, -1, max_steps=3)),
        (
            "steps must be integers",
            lambda: coverage_greedy(similarity, torch.tensor([1.0, 2.0]), max_steps=2),
        ),
        (
            "steps must be integers of shape",
            lambda: coverage_greedy(similarity, torch.tensor([1]), max_steps=2),
        ),
        ("k must lie in 1..6", lambda: dpp_greedy(similarity, 7)),
        ("k must lie in 1..6", lambda: dpp_greedy(similarity, 0)),
        ("budget must lie in 1..6", lambda: farthest_from_prefix(similarity, order, 1, 7)),
        ("budget must lie in 1..6", lambda: farthest_from_prefix(similarity, order, 1, 0)),
        ("order must be int64", lambda: farthest_from_prefix(similarity, order.int(), 1, 3)),
        ("order must be int64", lambda: farthest_from_prefix(similarity, order[:, :0], 0, 3)),
        ("count must not be negative", lambda: farthest_from_prefix(similarity, order, -1, 3)),
        (
            "count must be integers",
            lambda: farthest_from_prefix(similarity, order, torch.ones(2), 3),
        ),
    ]
    for message, call in bad:
        with pytest.raises(ValueError, match=message):
            call()


def test_the_masked_loops_read_nothing_back():
    # A meta tensor has no values: anything that needs one on the host raises.
    similarity = torch.empty(2, 10, 10, device="meta")
    steps = torch.empty(2, dtype=torch.int64, device="meta")
    chosen = torch.empty(2, 10, dtype=torch.bool, device="meta")
    order = torch.empty(2, 10, dtype=torch.int64, device="meta")
    weight = similarity[0, :2]
    for picks in (
        farthest_from_prefix(similarity, order, steps, 4, backend="masked"),
        dpp_greedy(similarity, 4, backend="masked"),
        coverage_greedy(similarity, steps, weight, weight, chosen, 4, backend="masked"),
    ):
        assert picks.shape == (2, 4)
        assert picks.is_meta


def test_no_images_and_inputs_that_require_gradients():
    none, order = torch.empty(0, 4, dtype=torch.int64), torch.arange(6)[None]
    assert farthest_from_prefix(torch.empty(0, 4, 4), none, 1, 2).shape == (0, 2)
    assert dpp_greedy(torch.empty(0, 4, 4), 2).shape == (0, 2)
    assert coverage_greedy(torch.empty(0, 4, 4), 2).shape == (0, 2)
    similarity = matrix("random", 6, 1).requires_grad_()
    weight = torch.rand(1, 6, requires_grad=True)
    for call in (
        lambda s, w: farthest_from_prefix(s, order, 1, 3),
        lambda s, w: dpp_greedy(s, 3),
        lambda s, w: coverage_greedy(s, 3, w, w, candidate_bonus=w),
    ):
        assert torch.equal(call(similarity, weight), call(similarity.detach(), weight.detach()))
