"""What tests of modes work on: checkpoints, made when asked for, and how answers are compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.testbed import build_checkpoint

from .modes import VISUAL


class Files:
    def __init__(self, folder):
        self.folder = folder
        self.model = build_checkpoint(folder / "model", image_size=112)

    def start(self, name, llm, environment=None, **spec):
        """Run modes.py; its result, or None if it did not end well, and all it printed."""
        given, out = self.folder / f"{name}.json", self.folder / f"{name}.out.json"
        given.write_text(json.dumps({"llm": {"model": str(self.model), **llm}, **spec}))
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("modes.py"), given, out],
            env={**os.environ, **(environment or {}), "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=550,
        )
        result = json.loads(out.read_text()) if done.returncode == 0 else None
        return result, done.stdout + done.stderr

    def run(self, *args, **kwargs):
        result, log = self.start(*args, **kwargs)
        assert result is not None, log[-4000:]
        return result


def counts(answers):
    return [answer["placeholders"] for answer in answers]


def same(left, right):
    """Whether two rounds are equal, up to what another order of float32 sums can change."""
    assert counts(left) == counts(right) == VISUAL
    for one, other in zip(left, right, strict=True):
        assert one["tokens"] == other["tokens"] and one["prompt"] == other["prompt"]
        for ours, theirs in zip(one["logprobs"], other["logprobs"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


def check(result, plain):
    for round_ in ("together", "alone", "after"):
        same(result[round_], plain["together"])


# What a request can ask for
# ---------------------------------------------------------------------------------------
