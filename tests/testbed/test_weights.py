"""The bundled model: what it was trained to be, and accuracy floors that a broken pruner would fall
through.
"""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from benchmarks.testbed import towers
from benchmarks.testbed.agreement import agreement
from benchmarks.testbed.bench import Bench
from benchmarks.testbed.data import Pictures
from benchmarks.testbed.export import load_clip, stated_sign
from benchmarks.testbed.questions import good_english
from benchmarks.testbed.stats import macro
from benchmarks.testbed.train import GATES
from fsr_vllm.demo import demo_model
from fsr_vllm.methods import SERVED_DEFAULTS

LEARNED = ("attribute", "object", "existence", "scene")


@pytest.fixture(scope="module")
def bench():
    return Bench("test", 60)


def mean(bench, outcome):
    return macro(outcome.right, bench.families, LEARNED)


def test_the_folder_is_small_and_complete():
    files = [file for file in demo_model().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 16e6
    card = (demo_model() / "README.md").read_text()
    report = json.loads((demo_model() / "training.json").read_text())
    assert report["recipe"]["plain"] is False and "python -m benchmarks.testbed.train" in card
    for family, value in report["accuracy"].items():
        assert family in card and f"{100 * value:.1f} %" in card
    printed = subprocess.run(
        [sys.executable, "-m", "fsr_vllm.cli", "demo-model"], capture_output=True, text=True
    )
    assert printed.stdout.strip() == str(demo_model())


def test_towers_pass_their_gates_on_held_out_scenes():
    clip, tokenizer = load_clip(demo_model() / "text_encoder")
    found = towers.gates(clip, tokenizer, Pictures.of("test", 60))
    assert (
        found["cls_attention"] > GATES["cls_attention"] and found["relevance"] > GATES["relevance"]
    )
    assert stated_sign() == 1


def test_unpruned_accuracy(bench):
    right = bench.off().right
    for family in LEARNED:
        assert right[bench.families == family].mean() > 0.85, family


def test_pruned_accuracy(bench):
    """Floors well below what was measured, and well above what truncation or chance selection
    reach.
    """
    full, served = mean(bench, bench.off()), SERVED_DEFAULTS.get("fsr", {})
    for budget, least in ((16, 0.55), (32, 0.85)):
        fsr, chance = (
            mean(bench, bench.method("fsr", budget, served)),
            mean(bench, bench.method("random", budget)),
        )
        assert fsr > least * full, budget
        assert fsr > chance + 0.1, budget
        assert fsr > mean(bench, bench.method("truncate", budget)) + 0.1, budget
    # A wrong sign does little harm at 16 tokens, where the scan covers the picture all the same; at
    # 8 it shows that relevance is read.
    for budget, least, most in ((16, -0.05, 0.05), (8, 0.1, 1.0)):
        right, flipped = (
            mean(bench, bench.method("fsr", budget, served, sign=sign)) for sign in (1, -1)
        )
        assert least < right - flipped < most, budget
    assert mean(bench, bench.oracle(32)) > 0.9 * full


def test_the_model_understands_good_english(bench):
    rows = [row for row, (_, question) in enumerate(bench.items) if " a orange" in question.text]
    trained, proper = bench.subset(np.array(rows)), bench.subset(np.array(rows))
    proper.items = [
        (i, dataclasses.replace(each, text=good_english(each.text))) for i, each in trained.items
    ]
    assert len(rows) > 5 and all(" an orange" in each.text for _, each in proper.items)
    for budget in (16, 32):
        said = [
            each.method("fsr", budget, SERVED_DEFAULTS["fsr"]).words for each in (trained, proper)
        ]
        assert np.mean([a == b for a, b in zip(*said, strict=True)]) > 0.9


def test_the_bench_asks_as_transformers_does(bench):
    processor = AutoProcessor.from_pretrained(demo_model())
    llava = LlavaForConditionalGeneration.from_pretrained(demo_model(), dtype=torch.float32).eval()
    rows = np.linspace(0, len(bench.items) - 1, 14).astype(int)
    part = bench.subset(rows)
    expected = part.off().words
    for (index, question), word in zip(part.items, expected, strict=True):
        content = [
            {"type": "image", "image": Image.fromarray(bench.pictures.images[index])},
            {"type": "text", "text": question.text},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            made = llava.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert (
            processor.decode(
                made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            ).strip()
            == word
        )


@pytest.mark.engine
@pytest.mark.parametrize("per_family", [4, pytest.param(200, marks=pytest.mark.full)])
def test_the_server_answers_as_the_python_api(per_family, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert os.environ.get("VLLM_PLUGINS") is None
    result = agreement(Bench("test", per_family), demo_model())
    assert result["asked"] == per_family * 7 * 6
    assert result["different"] == 0, result["runs"]
