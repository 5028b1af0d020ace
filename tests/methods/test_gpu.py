"""Every method on a GPU keeps what it keeps on the CPU, and works in half precision, with signals
as a server has.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.inputs import Cell, Images
from fsr_vllm.methods import VisualTokens, get_method, list_methods

CELL = Cell(576, 64, 128, 3)
DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def moved(tokens: VisualTokens, device: str) -> VisualTokens:
    fields = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
    return VisualTokens(
        **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
    )


@pytest.mark.parametrize("name", [*list_methods(), "fsr, served"])
def test_a_gpu_keeps_the_same(name):
    name, _, preset = name.partition(", ")
    method = get_method(name, preset=preset or "paper")
    tokens = Images.draw(CELL, "cpu", torch.float32).tokens(method)
    here, there = method.prune(tokens, CELL.k), method.prune(moved(tokens, DEVICE), CELL.k)
    # Products of matrices differ in the last bits, so a near tie may end otherwise, and what
    # follows from it.
    same = [
        len(set(a.tolist()) & set(b.tolist()))
        for a, b in zip(here.indices, there.indices, strict=True)
    ]
    assert sum(same) >= 0.95 * here.indices.numel(), same
    for row in range(CELL.batch):
        if torch.equal(here.indices[row], there.indices[row].cpu()):
            near = torch.isclose(there.tokens[row].cpu(), here.tokens[row], rtol=1e-3, atol=1e-3)
            assert near.float().mean() > 0.99
    half = Images.draw(CELL, DEVICE, torch.bfloat16).tokens(method)
    pruned = method.prune(half, CELL.k)
    assert pruned.tokens.dtype == torch.bfloat16 and pruned.tokens.isfinite().all()
    assert pruned.tokens.shape == (CELL.batch, CELL.k, CELL.d)
