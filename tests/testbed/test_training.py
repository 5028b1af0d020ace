"""The training script: a miniature of the whole run from the command line, and going on after it
was stopped.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoProcessor, AutoTokenizer, CLIPModel, LlavaForConditionalGeneration

from benchmarks.testbed import fit as fit_module
from benchmarks.testbed import language, towers
from benchmarks.testbed.export import load, tokenizers
from benchmarks.testbed.fit import adamw, fit
from benchmarks.testbed.questions import FAMILIES
from benchmarks.testbed.scenes import scene

ROOT = Path(__file__).parents[2]


def train(*options, ok=True):
    command = [sys.executable, "-m", "benchmarks.testbed.train", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    output = tmp_path_factory.mktemp("testbed") / "model"
    train("--miniature", "--output", output, "--device", "cpu", "--threads", 2)
    return output


def test_miniature_learns_something(miniature):
    report = json.loads((miniature / "training.json").read_text())
    assert set(report["accuracy"]) == set(FAMILIES)
    # After so few steps it knows which answers fit a question, no more: an untrained model scores
    # 0.
    assert (
        np.mean([report["accuracy"][family] for family in ("existence", "count", "relation")])
        > 0.35
    )
    card = (miniature / "README.md").read_text()
    assert "python -m benchmarks.testbed.train" in card and "{" not in card.replace("{0", "")


def test_miniature_loads_in_transformers(miniature):
    for kind, folder in (
        (LlavaForConditionalGeneration, miniature),
        (CLIPModel, miniature / "text_encoder"),
    ):
        model, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        assert next(model.parameters()).dtype == torch.float16
    assert AutoProcessor.from_pretrained(miniature).image_token == "<image>"
    assert AutoTokenizer.from_pretrained(miniature / "text_encoder")("red star")["input_ids"]


def test_a_plain_run_gives_a_tower_alone_that_states_its_sign(tmp_path):
    sizes = ("--pictures", 64, "--tower-steps", 20, "--checked", 20)
    train("--plain", *sizes, "--output", tmp_path / "tower", "--device", "cpu", "--threads", 1)
    report = json.loads((tmp_path / "tower" / "training.json").read_text())
    config = json.loads((tmp_path / "tower" / "text_encoder" / "config.json").read_text())
    assert (
        config["fsr_relevance_sign"]
        == report["sign"]
        == (1 if report["gates"]["relevance"] >= 0.5 else -1)
    )
    assert report["recipe"]["plain"] and report["recipe"]["tower_batch"] == 8
    assert not (tmp_path / "tower" / "model.safetensors").exists() and "accuracy" not in report


def test_a_finished_run_has_nothing_left_to_do(miniature):
    before = {file: file.read_bytes() for file in miniature.rglob("*.safetensors")}
    done = train("--miniature", "--output", miniature, "--device", "cpu", "--threads", 2)
    assert "100%|" in done.stderr and "/40 [00:00<?" not in done.stderr.replace(
        "40/40 [00:00<?", ""
    )
    assert {file: file.read_bytes() for file in miniature.rglob("*.safetensors")} == before


def test_another_recipe_does_not_go_on_from_this_one(miniature):
    done = train("--miniature", "--seed", 1, "--output", miniature, ok=False)
    assert "another recipe" in done.stderr and "--work" in done.stderr


class Stopped(Exception):
    pass


def test_stopped_and_resumed_equals_straight(tmp_path, monkeypatch):
    monkeypatch.setattr(fit_module, "SAVE_SECONDS", 0.0)

    def run(state, stop=None):
        torch.manual_seed(3)
        module = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)
        )
        muon = torch.optim.Muon(
            [module[0].weight, module[2].weight], lr=1e-2, adjust_lr_fn="match_rms_adamw"
        )

        def draw(step):
            if step == stop:
                raise Stopped
            return torch.from_numpy(np.random.default_rng([5, step]).normal(size=(4, 8))).float()

        def loss(x):
            return F.mse_loss(module(x), x.flip(1))

        optimizers = [muon, adamw([module[0].bias, module[2].bias], 1e-2)]
        seconds = fit(module, optimizers, draw, loss, 20, state, "test", warmup=5)
        assert seconds > 0
        return module.state_dict()

    straight = run(tmp_path / "straight.pt")
    for stop in (1, 7, 19):
        state = tmp_path / f"{stop}.pt"
        with pytest.raises(Stopped):
            run(state, stop)
        resumed = run(state)
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    module = torch.nn.Linear(2, 2)
    optimizers = [adamw(list(module.parameters()), 0.1)]
    state = tmp_path / "s.pt"
    with pytest.raises(RuntimeError, match="the loss is nan at step 0"):
        fit(
            module,
            optimizers,
            torch.tensor,
            lambda _: module.weight.sum() * torch.nan,
            3,
            state,
            "test",
        )


def test_packed_questions_are_as_if_alone(tmp_path):
    wording, _ = tokenizers(tmp_path)
    reader = language.Reader(towers.WIDTH, wording.tokenizer.get_vocab_size(), 0).eval()
    features = torch.randn(2, 144, towers.WIDTH, generator=torch.Generator().manual_seed(1))
    asked = [
        language.draw(scene("train", index), np.random.default_rng(index), 5) for index in range(2)
    ]
    with torch.no_grad():
        packed = language.Loss(reader, wording)(features, *language.pack(wording, asked))
        alone = []
        for index, questions in enumerate(asked):
            for question in questions:
                logits = language.next_words(
                    reader, wording, reader.project(features[[index]]), [question.text]
                )
                alone.append(
                    F.cross_entropy(logits, torch.tensor([wording.answer(question.answer)]))
                )
        answers = torch.stack(alone).mean()
        weight = language._END_WEIGHT
        # What the end tokens add is all that is left: it must be a mean of their losses, which one
        # run each gives too.
        ends = _end_losses(reader, wording, features, asked)
    torch.testing.assert_close(
        packed, (answers + weight * ends) / (1 + weight), rtol=1e-4, atol=1e-4
    )


def _end_losses(reader, wording, features, asked):
    losses = []
    for index, questions in enumerate(asked):
        for question in questions:
            ids = torch.tensor(
                [[*wording.question(question.text), wording.answer(question.answer)]]
            )
            embed = reader.llama.model.embed_tokens
            rows = torch.cat(
                [
                    embed(torch.tensor([wording.head])),
                    reader.project(features[[index]]),
                    embed(ids),
                ],
                1,
            )
            logits = reader.llama(inputs_embeds=rows).logits[:, -1]
            losses.append(F.cross_entropy(logits, torch.tensor([wording.end])))
    return torch.stack(losses).mean()


def test_a_saved_model_is_read_back_as_it_was(miniature):
    clip, reader, wording, clip_tokenizer = load(miniature)
    assert wording.answer("red") != wording.answer("blue")
    texts = towers.encode(clip, towers.tokens(clip_tokenizer, ["a red star", "a blue ring"]))
    assert texts.shape == (2, towers.JOINT)
    llava = LlavaForConditionalGeneration.from_pretrained(miniature, dtype=torch.float32)
    ours = dict(reader.llama.named_parameters())
    theirs = dict(llava.model.language_model.named_parameters())
    assert len(theirs) == len(ours) - 1  # all but the head
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[f"model.{name}"], tensor, rtol=0, atol=0)
