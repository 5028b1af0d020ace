"""Weights that are read again: the text tower's arrive as the model's own do, and what did not
change answers alike.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.testbed import build_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.full]


def run(model, out, *more):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, Path(__file__).with_name("reload.py"), model, out, *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text()), done.stdout + done.stderr


def shuffled(weights):
    """Weights of the same kinds and sizes, each tensor's values in another order."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: value.flatten()[torch.randperm(value.numel(), generator=generator)]
        .view(value.shape)
        .contiguous()
        for name, value in weights.items()
    }


def test_new_weights_of_the_text_tower_arrive(tmp_path):
    model = build_checkpoint(tmp_path / "model", image_size=112)
    changed = tmp_path / "changed.safetensors"
    save_file(
        shuffled(load_file(model / "text_encoder" / "model.safetensors")),
        changed,
        metadata={"format": "pt"},
    )
    reloaded, log = run(model, tmp_path / "reloaded.json", changed)
    fresh, _ = run(model, tmp_path / "fresh.json")  # the changed weights lie there now
    close = [pytest.approx(answer, abs=1e-4) for answer in reloaded["first"]]
    assert reloaded["again"] == close
    differ = [one != other for one, other in zip(fresh["first"], close, strict=True)]
    assert sum(differ) > len(differ) / 2, "weights that do not matter would show nothing"
    assert reloaded["changed"] == [pytest.approx(answer, abs=1e-4) for answer in fresh["first"]]
    for module in ("LayerNorm", "Linear", "Embedding"):
        assert f" {module}: Failed to load weights" not in log
