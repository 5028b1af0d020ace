"""Real engines: what the caches of images spare, what they must keep apart, and when they are
emptied.

One engine has all caches on, the other has all of them off; both answer the same shuffled requests.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.testbed import build_adapter, build_checkpoint

from .caching import IMAGES

pytestmark = pytest.mark.engine

BLOCK = 32
ON = {"additional_config": {"fsr": {}}}
OFF = {
    "additional_config": {"fsr": {"feature_cache_bytes": 0, "pixel_cache_bytes": 0}},
    "enable_prefix_caching": False,
    "mm_processor_cache_gb": 0,
}
# Room for some of the images only, so that entries come and go.
TIGHT = {
    "additional_config": {
        "fsr": {"feature_cache_bytes": 8 * 17_408, "pixel_cache_bytes": 5 * 150_528}
    }
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reuse")
    model = build_checkpoint(folder / "model", image_size=112)
    return model, build_adapter(folder / "adapter", model), folder


def run(files, name, llm, count, experiments=None):
    model, _, folder = files
    spec, out = folder / f"{name}.json", folder / f"{name}.out.json"
    given = {"llm": {"model": str(model), **llm}, "count": count, "experiments": experiments}
    spec.write_text(json.dumps(given))
    script = Path(__file__).with_name("caching.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, script, spec, out],
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def engines(files):
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    with ThreadPoolExecutor(2) as pool:
        on = pool.submit(run, files, "on", {**ON, **lora}, 120, {"lora": str(files[1])})
        off = pool.submit(run, files, "off", OFF, 120)
        return on.result(), off.result()


@pytest.fixture(scope="module")
def on(engines):
    return engines[0]


def same(left, right):
    """Whether two answers are equal, up to what another order of float32 sums can change."""
    close = left["logprobs"] == pytest.approx(right["logprobs"], abs=1e-4)
    return left["tokens"] == right["tokens"] and left["prompt"] == right["prompt"] and close


def mismatches(left, right):
    pairs = zip(left["interleaved"]["answers"], right["interleaved"]["answers"], strict=True)
    return [index for index, pair in enumerate(pairs) if not same(*pair)]


def test_interleaved_requests_are_answered_as_without_caches(engines):
    on, off = engines
    assert mismatches(on, off) == []
    answers = off["interleaved"]["answers"]
    assert len({tuple(answer["logprobs"]) for answer in answers}) > 100, (
        "a test that could not fail"
    )
    assert sum(answer["cached"] for answer in on["interleaved"]["answers"]) > 0


def test_tower_and_image_processor_run_once_per_distinct_image(engines):
    on, off = (engine["interleaved"]["counts"] for engine in engines)
    assert on["encoded"] == on["preprocessed"] == IMAGES
    assert off["encoded"] == off["preprocessed"] == 120
    assert on["features"] > 0 and on["pixels"] > 0 and off["features"] is off["pixels"] is None


def test_a_signal_that_is_lacking_is_computed_once_more_and_kept(on):
    start, *seen = on["missing_signal"]
    assert [number - start for number in seen] == [1, 1, 1, 1, 2, 2, 2]


def test_one_image_twice_in_a_prompt_is_one_image(on):
    before, after = on["twice_in_one_prompt"]["before"], on["twice_in_one_prompt"]["after"]
    for name in ("preprocessed", "encoded"):
        assert after[name] - before[name] == 1


def test_a_second_turn_reuses_the_whole_first_one(on):
    first, second, other = (on["turns"][name] for name in ("first", "second", "other question"))
    computed = (
        first["prompt"] + len(first["tokens"]) - 1
    )  # the last answer token was never fed back
    assert second["cached"] == computed // BLOCK * BLOCK > first["prompt"]
    assert other["cached"] == 0 and not same(
        other, second
    )  # another question keeps other tokens: from the image on


def test_without_a_question_the_image_prefix_serves_all_questions(on):
    image = 7 + 63  # tokens: those before the image, and its own
    for name in ("fsr_question empty", "query-agnostic method"):
        first, second = on["prefixes"][name]
        assert first["cached"] == 0 and second["cached"] == image // BLOCK * BLOCK
    assert [answer["cached"] for answer in on["prefixes"]["query-aware"]] == [0, 0]


def test_cache_salts_stay_apart(on):
    a, b, a_again, none = on["salts"]
    assert a["cached"] == b["cached"] == none["cached"] == 0 < a_again["cached"]
    assert same(a, b) and same(a, a_again) and same(a, none)


def test_uuids_stay_apart_and_budgets_within_a_uuid(on):
    first, second, first_again, other_budget, without = on["uuids"]
    assert first["cached"] == second["cached"] == other_budget["cached"] == without["cached"] == 0
    assert first_again["cached"] > 0 and same(first, second) and same(first, first_again)
    assert same(other_budget, without) and other_budget["prompt"] == first["prompt"] + 8


def test_adapters_stay_apart_and_share_the_tower(on):
    base, one, two, base_again = on["adapters"]["answers"]
    assert base["cached"] == one["cached"] == two["cached"] == 0 < base_again["cached"]
    assert not same(base, one) and same(one, two) and same(base, base_again)


@pytest.mark.parametrize(
    ("reset", "pixels", "features"),
    [
        ("nothing", 0, 0),
        ("reset_mm_cache", 1, 1),
        ("reset_encoder_cache", 0, 1),
        ("sleep", 1, 1),
        ("reload_weights", 0, 1),
    ],
)
def test_resets_of_vllm_empty_our_caches(on, reset, pixels, features):
    """Pixels do not depend on weights: what resets only the encoder leaves them."""
    found = on["resets"][reset]
    emptied, after = found["emptied"], found["after"]
    assert (emptied["pixels"] == 0, emptied["features"] == 0) == (bool(pixels), bool(features))
    assert after["preprocessed"] - emptied["preprocessed"] == pixels
    assert after["encoded"] - emptied["encoded"] == features
    assert same(found["again"], on["resets"]["nothing"]["again"])


@pytest.mark.full
@pytest.mark.parametrize("name", ["on", "tight", "shm"])
def test_a_thousand_interleaved_requests(files, cold, name):
    llm = {"on": ON, "tight": TIGHT, "shm": {**ON, "mm_processor_cache_type": "shm"}}[name]
    warm = run(files, f"{name} 1000", llm, 1000)
    assert mismatches(warm, cold) == []
    counts = warm["interleaved"]["counts"]
    if name == "tight":
        limits = TIGHT["additional_config"]["fsr"]
        assert (
            IMAGES < counts["encoded"] < 1000
            and counts["features"] <= limits["feature_cache_bytes"]
        )
        assert (
            IMAGES < counts["preprocessed"] < 1000
            and counts["pixels"] <= limits["pixel_cache_bytes"]
        )
    else:
        assert counts["encoded"] == counts["preprocessed"] == IMAGES


@pytest.fixture(scope="module")
def cold(files):
    return run(files, "off 1000", OFF, 1000)
