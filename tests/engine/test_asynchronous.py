"""AsyncLLM without a server: outputs know their visual tokens, no step gives the tower more than
unpruned images.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fsr_vllm

from .asynchronous import IMAGES, REQUESTS

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def outcome(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("asynchronous") / "out.json"
    script = Path(__file__).with_name("asynchronous.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, script, checkpoint, out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


def test_no_step_gives_the_tower_more_than_unpruned(outcome):
    """By placeholders alone, 2,048 of these images would fit a step; by their 576 unpruned tokens,
    three do.
    """
    assert {tuple(answer["visual"]) for answer in outcome["many"]} == {(IMAGES, IMAGES * 576)}
    assert sum(outcome["steps"]) == REQUESTS * IMAGES * 576
    assert max(outcome["steps"]) == 3 * 576


def test_outputs_of_plain_prompts_carry_kept_and_total(outcome):
    assert outcome["pruned"]["visual"] == [64, 576]
    assert outcome["unpruned"]["visual"] == [576, 576]
    assert outcome["unpruned"]["prompt"] - outcome["pruned"]["prompt"] == 576 - 64
    assert outcome["text"]["visual"] == [0, 0]


def test_a_uuid_in_the_form_of_our_identities_is_refused(outcome):
    assert outcome["uuid"]["field"] == "uuid" and "'fsr:'" in outcome["uuid"]["error"]


def test_what_is_not_known_is_none():
    assert fsr_vllm.visual_tokens(object()) is None
