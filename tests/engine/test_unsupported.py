"""Fields of ours on a model that the plugin does not prune, a small Qwen2.5-VL: refused on every
offline path.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unsupported")
    script, out = Path(__file__).with_name("unsupported.py"), folder / "out.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("VLLM_PLUGINS", None)
    command = [sys.executable, str(script), str(folder / "model"), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


ACTIVE = (
    "generate with a budget",
    "generate with a misspelt budget",
    "text with a budget",
    "chat with a budget",
    "a raw prompt of the engine",
)


@pytest.mark.parametrize("step", ACTIVE)
def test_active_names_the_architecture(outcome, step):
    assert (
        "fsr" in outcome[step]["error"]
        and "Qwen2_5_VLForConditionalGeneration" in outcome[step]["error"]
    )
    assert "ValueError" in outcome[step]["type"]


@pytest.mark.parametrize("step", ["async with a budget", "async text with a budget"])
def test_inactive_says_how_to_activate(outcome, step):
    assert outcome[step]["error"].startswith("fsr_budget: plugin fsr is not active")
    assert "ValueError" in outcome[step]["type"]


@pytest.mark.parametrize("step", ["extra_args", "async extra_args"])
def test_sampling_parameters_are_no_place_for_fields(outcome, step):
    assert (
        "mm_processor_kwargs" in outcome[step]["error"] and "fsr_budget" in outcome[step]["error"]
    )


def test_without_fields_nothing_changes(outcome):
    plain = outcome["generate"]["tokens"]
    assert plain.count(5) == 16  # the image's placeholders
    for step in ("chat", "null", "generate again", "async", "async again"):
        assert outcome[step]["tokens"] == plain
