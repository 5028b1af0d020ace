"""Offline `LLM.chat` on a real engine: the question, the budget and the details come from the
conversations.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

WHAT, WHO = "What is this?", "Who has a red flag?"
# One call, one budget, and the question that each of the first three asks.
SAID = [
    [["user", "chelsea", WHAT]],
    [["user", "chelsea", WHO]],
    [["user", "chelsea", WHAT], ["assistant", "A cat."], ["user", WHO]],
    [["user", "Say something."]],
]
QUESTIONS = (WHAT, WHO, WHAT)
BAD = [
    {"fsr_budget": [1, 2]},
    {"fsr_budget": 0},
    {"fsr_question": 3},
    {"fsr_bugdet": 1},
    {"fsrBudget": 32},
]
STEPS = {
    "derived": {"chat": SAID, "fields": {"fsr_budget": 32}},
    **{
        f"given {i}": {
            "chat": [SAID[i]],
            "fields": {"fsr_budget": 32, "fsr_question": QUESTIONS[i]},
        }
        for i in range(3)
    },
    "integer of numpy": {"chat": SAID[:1], "fields": {"fsr_budget": 32}, "numpy": True},
    "share of numpy": {"chat": SAID[:1], "fields": {"fsr_budget": 0.25}, "numpy": True},
    "details": {"chat": [[["user", "chelsea:low", "rocket:high", "coffee", WHAT]]]},
    "details and budgets": {
        "chat": [[["user", "chelsea:low", "rocket", WHAT]]],
        "fields": {"fsr_budget": [10, 20]},
    },
    "nothing asked": {"chat": SAID[:1]},
    **{f"bad {i}": {"chat": SAID[:1], "fields": fields} for i, fields in enumerate(BAD)},
    "embeddings": {"chat": [[["user", "embeds:100", WHAT]]]},
    "embeddings unpruned": {
        "chat": [[["user", "embeds:100", WHAT]]],
        "fields": {"fsr_budget": "off"},
    },
    "embeddings generated": [{"parts": ["embeds:100", WHAT]}],
    "bad with embeddings": {"chat": [[["user", "embeds:100", WHAT]]], "fields": {"fsr_budget": 64}},
    "bad without an image": {"chat": SAID[3:], "fields": {"fsr_budget": 0}},
    "bad spelling without an image": {"chat": SAID[3:], "fields": {"fsr-budget": 64}},
    "bad place": {"chat": [[["user", "chelsea:low:fsr_budget", WHAT]]], "fields": {}},
}


@pytest.fixture(scope="module")
def outcome(checkpoint, tmp_path_factory):
    """What an engine with details and a user's own worker extension answered, by step."""
    folder = tmp_path_factory.mktemp("chat")
    settings = {"fsr": {"detail_budgets": {"low": 16, "high": 0.5}}}
    extension = {"worker_extension_cls": "tests.engine.probe.ProbeExtension"}
    llm = {
        "model": str(checkpoint),
        "additional_config": settings,
        "enable_mm_embeds": True,
        **extension,
    }
    (folder / "spec.json").write_text(json.dumps({"llm": llm, "steps": list(STEPS.values())}))
    script = Path(__file__).with_name("offline.py")
    command = [sys.executable, str(script), str(folder / "spec.json"), str(folder / "out.json")]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answered = json.loads((folder / "out.json").read_text())
    return {**dict(zip(STEPS, answered["results"], strict=True)), "stats": answered["stats"]}


def alike(left, right):
    assert left["tokens"] == right["tokens"] and left["prompt"] == right["prompt"]
    assert left["logprobs"] == pytest.approx(right["logprobs"], abs=1e-4)


def test_each_conversation_asks_its_own_question(outcome):
    derived = outcome["derived"]
    for i in range(3):
        alike(derived[i], outcome[f"given {i}"][0])
    assert derived[0]["logprobs"] != derived[1]["logprobs"]
    assert [answer["visual"] for answer in derived] == [[32, 576]] * 3 + [[0, 0]]


def test_numbers_of_numpy(outcome):
    alike(outcome["integer of numpy"][0], outcome["given 0"][0])
    assert outcome["share of numpy"][0]["visual"] == [144, 576]


def test_details_belong_to_images_and_give_way_to_budgets(outcome):
    assert outcome["details"][0]["visual"] == [16 + 288 + 576, 3 * 576]
    assert outcome["details and budgets"][0]["visual"] == [30, 2 * 576]
    assert outcome["nothing asked"][0]["visual"] == [576, 576]


def test_embeddings_are_never_pruned(outcome):
    """Although details have budgets here."""
    for step in ("embeddings", "embeddings unpruned", "embeddings generated"):
        assert outcome[step][0]["visual"] == [100, 100]
    assert "image_embeds" in outcome["bad with embeddings"]["error"]


@pytest.mark.parametrize("step", [step for step in STEPS if step.startswith("bad")])
def test_bad_fields_name_themselves(outcome, step):
    refused = outcome[step]
    name = next(iter(STEPS[step]["fields"]), "messages[0].content[0].fsr_budget")
    assert name in refused["error"] and "ValueError" in refused["type"]


def test_statistics_are_there_beside_a_users_own_extension(outcome):
    stats = outcome["stats"]
    answers = [answer for step in STEPS for answer in outcome[step] if not step.startswith("bad")]
    assert stats["visual_tokens_kept"] == sum(answer["visual"][0] for answer in answers)
    assert stats["visual_tokens_total"] == sum(answer["visual"][1] for answer in answers)
    assert stats["workers"][0]["pruned_images"] > 0
