"""LLaVA-NeXT on real engines, offline, against stock vLLM and transformers.

Every configuration is one process with one engine. Two run always; those that repeat their requests
under other caches, chunks and bounds are marked `full`.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from .next_requests import (
    ALL_ASKED,
    BAD,
    CONFIGURATIONS,
    JOINT,
    JOINTLY_SERVED,
    METHODS,
    MIXED,
    SERVED,
    TURNS,
    UUIDS,
    WIDE,
    images,
)
from .transformers_next import Reference

pytestmark = pytest.mark.engine
FULL = pytest.mark.full


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints("llava_next")


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder)


@pytest.fixture(scope="module")
def outcome(folder, tmp_path_factory):
    """A function from the name of a configuration to what its engine answered; each starts once,
    two at a time.
    """
    place, root = tmp_path_factory.mktemp("llava-next"), Path(__file__).parents[2]

    def run(name):
        configuration = CONFIGURATIONS[name]
        spec, out = place / f"{name}.json", place / f"{name}.out.json"
        given = {key: configuration[key] for key in ("steps", "probe") if key in configuration}
        given["llm"] = {"model": str(folder), **configuration["llm"]}
        spec.write_text(json.dumps(given))
        environment = {**os.environ, "PYTHONPATH": str(root), **configuration.get("env", {})}
        command = [sys.executable, "-m", "tests.engine.families", str(spec), str(out)]
        options = {"capture_output": True, "text": True, "timeout": 500}
        done = subprocess.run(command, env=environment, cwd=root, **options)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(out.read_text())

    with ThreadPoolExecutor(2) as pool:
        started = {}

        def get(name):
            for each in ("stock", "active", name):  # the first two are always asked for
                if each not in started:
                    started[each] = pool.submit(run, each)
            return started[name].result()

        yield get


def same(left, right, tolerance=1e-4):
    """Equal prompts and greedy tokens, and log-probabilities but for other orders of sums."""
    assert [one["ids"] for one in left] == [one["ids"] for one in right]
    assert [one["tokens"] for one in left] == [one["tokens"] for one in right]
    for one, other in zip(left, right, strict=True):
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=tolerance)


def expected(made, reference):
    """K of each image of a request, by the rules of the documents and transformers' N."""
    totals = [reference.total(part) for part in images(made)]
    budget = made.get("fields", {}).get("fsr_budget", "off")
    if isinstance(budget, dict):
        return shared(budget["total"], totals)
    budgets = budget if isinstance(budget, list) else [budget] * len(totals)
    return [
        total
        if one == "off"
        else max(1, int(one * total + 0.5))
        if isinstance(one, float)
        else min(one, total)
        for one, total in zip(budgets, totals, strict=True)
    ]


def shared(total, sizes):
    """Largest remainders, where no part is below one token."""
    quotas = [total * size / sum(sizes) for size in sizes]
    assert min(quotas) >= 1
    parts = [int(quota) for quota in quotas]
    by_rest = sorted(range(len(sizes)), key=lambda place: parts[place] - quotas[place])
    for place in by_rest[: total - sum(parts)]:
        parts[place] += 1
    return parts


def test_without_a_budget_or_with_a_large_one_it_is_stock_vllm(outcome):
    stock = outcome("stock")["results"][0]
    assert len({tuple(one["logprobs"]) for one in stock}) == len(stock)
    results = outcome("active")["results"]
    for step in (*results[:3], results[-1]):
        same(step, stock)


def test_placeholders_are_exactly_the_budgets(outcome, reference):
    answers = outcome("active")["results"][3]
    for (made, *_), answer in zip(ALL_ASKED, answers, strict=True):
        counts = expected(made, reference)
        assert answer["placeholders"] == counts, made
        totals = [reference.total(part) for part in images(made)]
        assert answer["visual"] == [sum(counts), sum(totals)]
    assert {1, 13} <= {answer["placeholders"][0] for answer in answers if answer["placeholders"]}


@pytest.mark.parametrize("place", range(len(ALL_ASKED)))
def test_answers_are_those_of_transformers_on_the_pruned_rows(outcome, reference, place):
    made, method, question = ALL_ASKED[place]
    answer = outcome("active")["results"][3][place]
    parts, counts = images(made), expected(made, reference)
    questions = question if isinstance(question, list) else [question] * len(parts)
    joint = made.get("fields", {}).get("fsr_options") == JOINT
    rows = [
        reference.kept(part, count, method, text, joint)
        for part, count, text in zip(parts, counts, questions, strict=True)
    ]
    tokens, logprobs = reference.answer(answer["ids"], rows)
    assert answer["tokens"] == tokens
    assert answer["logprobs"] == pytest.approx(logprobs, abs=1e-3)


def test_budgets_questions_and_tiles_matter(outcome):
    answers = outcome("active")["results"][3]
    wide = [
        tuple(answer["logprobs"])
        for made, answer in zip(MIXED, answers, strict=True)
        if images(made) == [WIDE]
    ]
    assert len(wide) == len(set(wide)) == 9


@pytest.mark.parametrize("name", ["active", pytest.param("tensor parallel", marks=FULL)])
def test_rows_and_signals_are_those_of_transformers(outcome, reference, name):
    asked, found = CONFIGURATIONS[name]["probe"], outcome(name)["probed"]
    each = [(*one, rank) for one, ranks in zip(asked, found, strict=True) for rank in ranks]
    assert len(each) == len(asked) * (2 if name == "tensor parallel" else 1)
    for part, question, probed in each:
        image = reference.image(part)
        patches = torch.tensor(probed["patches"])
        assert torch.equal(patches[:, 0], image["tiles"])
        assert torch.equal(patches[:, 1], image["patch"])
        for name in ("saliency", "received", "shallow_saliency@5"):
            torch.testing.assert_close(torch.tensor(probed[name]), image[name], atol=1e-5, rtol=0)
        for name in ("rows", "metric"):  # of size 1 and more
            torch.testing.assert_close(torch.tensor(probed[name]), image[name], atol=1e-4, rtol=0)
        inside = image["tiles"] >= 0
        relevance = reference.relevance(part, question)
        torch.testing.assert_close(
            torch.tensor(probed["relevance"])[inside], relevance[inside], atol=1e-5, rtol=0
        )


def test_the_prefix_of_an_image_is_known_again(outcome):
    first, again = outcome("active")["results"][3:5]
    same(again, first)
    for answer in again:
        blocks = (len(answer["ids"]) - 1) // 32 * 32
        assert answer["cached"] == blocks
    assert max(answer["cached"] for answer in again) > 100


def test_a_second_turn_keeps_what_the_first_one_kept(outcome, reference):
    for made, answer in zip(TURNS, outcome("active")["results"][5], strict=True):
        then, counts = answer["then"], expected(made, reference)
        assert answer["placeholders"] == then["placeholders"] == counts
        assert then["cached"] >= len(answer["ids"]) // 32 * 32 > 0
        method = made["fields"].get("fsr_method", "fsr")
        question = made["fields"].get("fsr_question", "")
        rows = [
            reference.kept(part, count, method, question)
            for part, count in zip(images(made), counts, strict=True)
        ]
        tokens, logprobs = reference.answer(then["ids"], rows)
        assert then["tokens"] == tokens
        assert then["logprobs"] == pytest.approx(logprobs, abs=1e-3)


def test_every_served_method_keeps_exactly_its_budget(outcome):
    answers = outcome("active")["results"][6]
    assert [answer["placeholders"] for answer in answers] == [[45]] * len(METHODS)
    split, joint = answers[: len(SERVED)], answers[len(SERVED) :]
    for some in (split, joint):
        assert len({tuple(answer["logprobs"]) for answer in some}) >= len(some) - 3
    for name, one in zip(JOINTLY_SERVED, joint, strict=True):
        assert one["logprobs"] != split[SERVED.index(name)]["logprobs"], name


def test_what_cannot_be_is_refused_and_the_engine_lives_on(outcome):
    wrong = outcome("active")["results"][7 : 7 + len(BAD)]
    words = [
        "fsr_budget has 1 entries for 2 image(s)",
        'fsr_budget {"total": 1} is fewer than the 2 images',
        "cannot be an entry of a list",
        "'vflowopt' reads attention, which every tile has for itself",
        'fsr_options.tiles must be "split", "joint" or absent',
    ]
    for refused, said in zip(wrong, words, strict=True):
        assert said in refused["error"] and "ValueError" in refused["type"]


def test_each_image_goes_through_the_tower_once(outcome):
    stats = outcome("active")["stats"]
    pictures = 6 + 4  # by content; two of them under two names each
    assert stats["preprocessed_images"] == pictures
    (worker,) = stats["workers"]
    # Once for the first request about it; again for a method that reads another signal.
    assert pictures <= worker["tower_images"] <= pictures + 4
    assert worker["feature_hits"] > 20 and worker["feature_entries"] == pictures


def test_a_name_alone_stands_for_an_image_of_known_size(outcome):
    start = 7 + len(BAD)
    sent, alone, other, unknown, swapped = outcome("active")["results"][start : start + len(UUIDS)]
    same(alone, sent)
    assert alone[0]["placeholders"] == [9, 35]
    assert "not provided" in other["error"]
    assert "uuid 'unknown': this server does not know the image" in unknown["error"]
    # Each name is given to the other image: what was sent last counts.
    assert swapped[0]["placeholders"] == [9, 35]
    same(swapped, sent)


@FULL
def test_caches_on_and_off_give_the_same_answers(outcome):
    off, on = outcome("no caches")["results"], outcome("active")["results"]
    same(off[0], on[0])
    same([answer for step in off[1 : 1 + len(MIXED)] for answer in step], on[3])
    same(off[-1], on[5])
    same([one["then"] for one in off[-1]], [one["then"] for one in on[5]])


@FULL
@pytest.mark.parametrize("name", ["chunked", "tensor parallel"])
def test_the_same_answers_where_prefills_cut_images_and_with(outcome, name):
    cut, whole = outcome(name)["results"], outcome("active")["results"]
    same(cut[0], whole[0])
    same(cut[1], whole[3])


@FULL
def test_a_maximum_bounds_every_image(outcome):
    default, off, share, above, within, below = outcome("maximum")["results"]
    assert default[0]["placeholders"] == [40]
    assert 'fsr_budget "off" of 192 = 192, above this server\'s maximum 40' in off["error"]
    assert "fsr_budget 0.5 of 140 = 70, above this server's maximum 40" in share["error"]
    assert "above this server's maximum 40" in above["error"] and '"total": 90' in above["error"]
    assert sum(within[0]["placeholders"]) == 50 and max(within[0]["placeholders"]) <= 40
    assert "below this server's minimum 4" in below["error"]
