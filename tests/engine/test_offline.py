"""Real engines, offline: what pruning must never change, in several configurations of vLLM.

Every configuration is one process with one engine, started once and shared by the tests; two run at
a time.
"""

import base64
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from benchmarks.testbed import photos
from fsr_vllm.methods.prototypes import save_prototypes

from .configurations import BAD, CONFIGURATIONS, MIXED, PROMPTS, REFUSED, SERVED, WHAT

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def pixels(checkpoint):
    """A photograph as the tower gets it."""
    return CLIPImageProcessor.from_pretrained(checkpoint)(
        photos()["chelsea"], return_tensors="pt"
    ).pixel_values


@pytest.fixture(scope="module")
def outcome(checkpoint, pixels, tmp_path_factory):
    """A function from the name of a configuration to what its engine answered; two engines start at
    a time.
    """
    folder = tmp_path_factory.mktemp("offline")

    def run(name):
        spec, out = folder / f"{name}.json", folder / f"{name}.out.json"
        configuration = CONFIGURATIONS[name]
        llm = {"model": str(checkpoint), **configuration["llm"]}
        given = {"llm": llm, "steps": configuration["steps"]}
        if configuration.get("probe"):
            given["probe"] = [base64.b64encode(pixels.numpy().tobytes()).decode(), WHAT]
        spec.write_text(json.dumps(given))
        script = Path(__file__).with_name("offline.py")
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            **configuration.get("env", {}),
        }
        done = subprocess.run(
            [sys.executable, script, spec, out],
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(out.read_text())

    codebook = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    (checkpoint / "fsr").mkdir()
    save_prototypes(codebook, checkpoint / "fsr" / "prototypes.safetensors")
    with ThreadPoolExecutor(2) as pool:
        futures: dict[str, Future] = {}

        def get(name):
            if not futures:
                futures.update({each: pool.submit(run, each) for each in CONFIGURATIONS})
            return futures[name].result()

        yield get
        for future in futures.values():
            future.cancel()


def same(left, right, tolerance=1e-4):
    """Equal greedy tokens, and log-probabilities up to what another order of float32 sums can
    change.
    """
    assert [r["tokens"] for r in left] == [r["tokens"] for r in right]
    assert [r["prompt"] for r in left] == [r["prompt"] for r in right]
    for a, b in zip(left, right, strict=True):
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=tolerance)


def flat(steps):
    return [answer for step in steps for answer in step]


def test_installed_but_not_active_changes_nothing(outcome):
    stock, inactive = outcome("stock"), outcome("inactive")
    assert inactive["results"][0] == stock["results"][0]  # bit for bit: the very same code ran
    assert "not active" in inactive["stats"]["error"]


def test_fields_without_the_plugin_say_how_to_activate_it(outcome):
    refused = outcome("inactive")["results"][1]
    assert "not active" in refused["error"] and "--plugin fsr" in refused["error"]
    assert "ValueError" in refused["type"]


def test_active_but_unpruned_is_vanilla_vllm(outcome):
    plain = outcome("stock")["results"][0]
    assert plain[0]["tokens"] != plain[3]["tokens"], (
        "a test that could not fail: all answers are alike"
    )
    for step in outcome("active")["results"][:3]:
        same(step, plain)


def test_prompts_shrink_to_exactly_the_budget(outcome):
    answers = flat(outcome("active")["results"][3 : 3 + len(MIXED)])
    base = [answer["prompt"] - visual for answer, visual in zip(answers, PROMPTS, strict=True)]
    text = {
        tuple(part for part in r["parts"]): length for r, length in zip(MIXED, base, strict=True)
    }
    assert base == [
        text[tuple(r["parts"])] for r in MIXED
    ]  # whatever the budget, the rest of the prompt is the same
    unpruned = outcome("stock")["results"][0][0]["prompt"] - 576
    assert base[0] == unpruned


def test_budget_question_method_and_options_all_matter(outcome):
    answers = flat(outcome("no caches")["results"][: len(MIXED)])
    chelsea = [answers[i]["logprobs"] for i in (0, 1, 2, 4, 5, 6, 10)]
    assert len({tuple(x) for x in chelsea}) == len(chelsea)
    assert answers[0] == answers[9]


@pytest.mark.parametrize("repeat", [0, 1])
def test_caches_never_mix_budgets_questions_or_methods(outcome, repeat):
    start = 3 + repeat * len(MIXED)
    cached = flat(outcome("active")["results"][start : start + len(MIXED)])
    same(cached, flat(outcome("no caches")["results"][: len(MIXED)]))
    if repeat:
        assert all(
            answer["cached"] for answer in cached if answer["prompt"] > 32
        )  # and the caches were used


def test_a_mixed_batch_equals_single_requests(outcome):
    alone = flat(outcome("no caches")["results"][: len(MIXED)])
    same(outcome("active")["results"][3 + 2 * len(MIXED)], alone)


def test_bad_values_are_refused_and_the_engine_lives_on(outcome):
    results = outcome("active")["results"]
    first = 4 + 2 * len(MIXED)
    for fields, refused in zip(BAD, results[first : first + len(BAD)], strict=True):
        assert next(iter(fields)) in refused["error"] and "ValueError" in refused["type"]
    same(results[-1], results[3 + 2 * len(MIXED)])


def test_outputs_carry_kept_and_total(outcome):
    answers = flat(outcome("no caches")["results"][: len(MIXED)])
    assert [answer["visual"][0] for answer in answers] == PROMPTS
    assert [answer["visual"][1] for answer in answers] == [
        576 * (2 if "rocket" in r["parts"] else 1) for r in MIXED
    ]


def test_statistics_count_requests_and_work(outcome):
    stats = outcome("active")["stats"]
    assert stats["visual_tokens_total"] > stats["visual_tokens_kept"] > 0
    worker = stats["workers"][0]
    assert 0 < worker["pruned_images"] < stats["pruned_images"]  # the rest came from caches
    assert worker["k_focus"] > 0 and worker["seconds_select"] > 0


def test_images_of_equal_budget_are_pruned_in_one_call(outcome):
    worker = outcome("maximum")["stats"]["workers"][0]
    # Three images of one request in one call, and the five of MANY in two: the bound of a batch is
    # three.
    assert worker["pruned_images"] - worker["selection_calls"] == 2 + 3


@pytest.mark.parametrize("name", ["chunked", "tensor parallel"])
def test_same_answers_with(outcome, name):
    alone = flat(outcome("no caches")["results"][: len(MIXED)])
    results = outcome(name)["results"]
    same(flat(results[: len(MIXED)]), alone)
    same(results[len(MIXED)], alone)


@pytest.mark.parametrize("name", ["active", "chunked", "tensor parallel"])
def test_two_images_are_encoded_and_preprocessed_once_each(outcome, name):
    """Whatever vLLM's processor cache is (its own copy, shared memory, none), and alike on every
    rank.
    """
    stats = outcome(name)["stats"]
    assert stats["preprocessed_images"] == 2
    for worker in stats["workers"]:
        assert worker["tower_images"] == 2 and worker["feature_hits"] > 2
        mine = {key: value for key, value in worker.items() if key.startswith("feature_")}
        assert mine == {
            key: value for key, value in stats["workers"][0].items() if key.startswith("feature_")
        }
    assert len(stats["workers"]) == (2 if name == "tensor parallel" else 1)


def test_a_maximum_lets_more_images_into_a_prompt(outcome):
    assert "2048" in outcome("stock")["results"][1]["error"].replace(",", "")
    assert outcome("maximum")["results"][8][0]["prompt"] < 2048 - 5 * 64 * 5


def test_a_maximum_is_the_default_and_a_bound(outcome):
    results = outcome("maximum")["results"]
    unpruned = outcome("stock")["results"][0][0]["prompt"]
    assert results[0][0]["prompt"] == unpruned - 576 + 64
    for refused in results[1:5]:
        assert "fsr_budget" in refused["error"]
    # The language model's own embeddings stand in for a text tower, and the question matters to
    # them too.
    assert results[5][0]["logprobs"] != results[6][0]["logprobs"]


def test_every_method_runs_by_changing_one_word(outcome):
    results = outcome("no caches")["results"][len(MIXED) :]
    answers = dict(zip((*SERVED, *REFUSED), results, strict=True))
    assert {answers[name][0]["prompt"] for name in SERVED} == {answers["fsr"][0]["prompt"]}
    distinct = {tuple(answers[name][0]["logprobs"]) for name in SERVED}
    assert len(distinct) >= len(SERVED) - 2  # scores may agree on the best tokens now and then
    for name in REFUSED:
        assert "fsr_method" in answers[name]["error"] and name in answers[name]["error"]


@pytest.mark.parametrize("name", ["no caches", "tensor parallel"])
def test_signals_are_those_of_transformers(outcome, checkpoint, pixels, name):
    """Attention of [CLS], attention received, CLIP's own text embedding: by another library, in
    eager mode.
    """
    folder = checkpoint / "text_encoder"
    clip = CLIPModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        seen = clip.vision_model(pixels, output_attentions=True, output_hidden_states=True)
        saliency = seen.attentions[-2][0, :, 0, 1:].mean(0)
        received = seen.attentions[-2][0].mean((0, 1))[1:]
        shallow = seen.attentions[round(8 * len(seen.attentions) / 24)][0].mean((0, 1))[1:]
        text = clip.get_text_features(**tokenizer(WHAT.lower(), return_tensors="pt"))
        text = getattr(text, "pooler_output", text)
        patches = clip.visual_projection(
            clip.vision_model.post_layernorm(seen.hidden_states[-2][0, 1:])
        )
        relevance = torch.cosine_similarity(patches, text)
    for worker in outcome(name)["signals"]:
        torch.testing.assert_close(torch.tensor(worker["saliency"]), saliency, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(worker["received"]), received, atol=1e-6, rtol=0)
        torch.testing.assert_close(
            torch.tensor(worker["shallow_received@8"]), shallow, atol=1e-6, rtol=0
        )
        torch.testing.assert_close(torch.tensor(worker["relevance"]), relevance, atol=1e-5, rtol=0)
