"""The Triton kernels: interpreted on the CPU, compiled for two GPUs without one, and run on one
where there is one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fsr_vllm import kernels

from . import oracles
from .oracles import KINDS, draws, lopsided, matrix

pytest.importorskip("triton")

Call = tuple[str, tuple[Any, ...], dict[str, Any]]


def calls(sizes: dict[int, int]) -> dict[str, Call]:
    """Calls by name, for each number of tokens with that many steps."""
    found: dict[str, Call] = {}
    for tokens, steps in sizes.items():
        for number, kind in enumerate(KINDS):
            similarity = matrix(kind, tokens, 10 + number, batch=2)
            generator = torch.Generator().manual_seed(number)
            quarters, selected = draws(tokens, number, batch=2)
            weight = quarters * torch.rand(2, tokens, generator=generator)
            order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(2)])
            own = torch.tensor([steps, steps // 2])
            count = torch.tensor([steps // 3, tokens])
            kernel = weight[:, :, None] * similarity * weight[:, None, :]
            uneven = lopsided(tokens, number, batch=2)
            everything = {"row_weight": weight, "candidate_weight": quarters}
            rounds: dict[str, Call] = {
                "farthest": ("farthest_from_prefix", (uneven, order, count, steps), {}),
                "farthest, one": (
                    "farthest_from_prefix",
                    (similarity, order[:, :1].clone(), 1, steps),
                    {},
                ),
                "prefix": ("farthest_from_prefix", (similarity, order, count, steps), {}),
                "dpp": ("dpp_greedy", (kernel if number % 2 else similarity, steps), {}),
                "dpp, full rank": ("dpp_greedy", (uneven + torch.eye(tokens), steps), {}),
                "coverage": (
                    "coverage_greedy",
                    (uneven, own),
                    {"max_steps": steps, "selected": selected},
                ),
                "coverage, everything": (
                    "coverage_greedy",
                    (similarity, steps),
                    {**everything, "candidate_bonus": -quarters, "selected": selected},
                ),
            }
            found.update(
                {f"{name}, {kind}, {tokens} -> {steps}": call for name, call in rounds.items()}
            )
    return found


def run(call: Call, backend: str, device: str = "cpu") -> torch.Tensor:
    name, args, kwargs = call

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    moved = {key: move(value) for key, value in kwargs.items()}
    return getattr(kernels, name)(*map(move, args), **moved, backend=backend).cpu()


def test_interpreted_kernels_pick_the_same(tmp_path):
    asked = calls({1: 1, 7: 7, 33: 12, 128: 6})
    torch.save(list(asked.values()), tmp_path / "calls")
    root = Path(kernels.__file__).parents[2]
    subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("interpret.py"),
            tmp_path / "calls",
            tmp_path / "answers",
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    for (name, call), answer in zip(asked.items(), torch.load(tmp_path / "answers"), strict=True):
        loop, args, kwargs = call
        assert torch.equal(answer, run(call, "torch")), name
        assert torch.equal(answer, getattr(oracles, loop)(*args, **kwargs)), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu_pick_the_same_and_never_wait():
    for name, call in calls({1: 1, 7: 7, 128: 40, 576: 64, 1500: 100}).items():
        expected = run(call, "torch")
        assert torch.equal(run(call, "triton", "cuda"), expected), name
        if call[0] != "dpp_greedy":
            assert torch.equal(run(call, "masked", "cuda"), expected), name
    similarity = matrix("random", 64, 0).cuda()
    steps = torch.tensor([5], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for backend in ("triton", "masked"):
            kernels.farthest_from_prefix(
                similarity, torch.argsort(similarity[0, :1]), steps, 9, backend=backend
            )
            kernels.dpp_greedy(similarity, 9, backend=backend)
            kernels.coverage_greedy(
                similarity, steps, similarity[0, :1].abs(), max_steps=9, backend=backend
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")


FLOATS = (
    "similarity",
    "kernel",
    "factor",
    "covered",
    "row_weight",
    "scale",
    "bonus",
    "low",
    "high",
)
TYPES = {
    **dict.fromkeys(FLOATS, "*fp32"),
    **dict.fromkeys(("prefix", "count", "steps", "picks"), "*i64"),
    **dict.fromkeys(("prefix_stride", "factor_stride", "tokens", "width"), "i32"),
    "gains": "*fp64",
    "risen": "*i32",
    "eps": "fp32",
}


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="kernels are interpreted")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("name", "constants", "types"),
    [
        ("_farthest", {"BLOCK": 4096, "UNROLL": 4}, {}),
        ("_dpp", {"BLOCK": 4096, "UNROLL": 4}, {"steps": "i32"}),
        ("_cover", {"COLUMNS": 64, "UNROLL": 4}, {}),
        ("_gains", {"WEIGHTED": True, "ROWS": 32, "COLUMNS": 64}, {}),
        (
            "_coverage",
            {"WEIGHTED": True, "SCALED": True, "RAISED": True, "BLOCK": 4096, "UNROLL": 4},
            {},
        ),
        (
            "_coverage",
            {"WEIGHTED": False, "SCALED": False, "RAISED": False, "BLOCK": 1024, "UNROLL": 4},
            {},
        ),
    ],
)
def test_kernels_compile_for_a_gpu_without_fused_float32_arithmetic(
    name, constants, types, capability, tmp_path, monkeypatch
):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fsr_vllm.kernels import triton_ops

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(triton_ops, name)
    signature = {
        arg: "constexpr" if arg in constants else {**TYPES, **types}[arg]
        for arg in function.arg_names
    }
    compiled = triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": 16 if constants.get("BLOCK") == 4096 else 4,
            "enable_fp_fusion": False,
        },
    )
    text = compiled.asm["ptx"]
    assert not re.search(r"\bfma\.rn\.f32\b", text)
    # Without .rn the assembler may still fuse a product with a sum.
    assert not re.search(r"\b(mul|add|sub)\.f32\b", text)
    assert name != "_dpp" or ("sqrt.rn.f32" in text and "div.rn.f32" in text)
