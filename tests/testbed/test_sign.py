"""A real tower whose patch-text similarity is inverted, as OpenAI's CLIP has it: the sign it states
sets that right.

`inverted/` was made by `python -m benchmarks.testbed.train --plain`; [CLS] alone was trained, patches
were left to themselves.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.testbed import towers
from benchmarks.testbed.bench import signals_of
from benchmarks.testbed.data import Pictures, pixels
from benchmarks.testbed.export import TEXT_ENCODER, load_clip, stated_sign
from benchmarks.testbed.questions import ask
from benchmarks.testbed.scenes import patches
from fsr_vllm.engine.text_encoder import find_encoder
from fsr_vllm.methods import get_method
from fsr_vllm.methods.base import VisualTokens
from fsr_vllm.params import SERVED_DEFAULTS
from fsr_vllm.signals.relevance import clip_relevance

FOLDER = Path(__file__).parent / "inverted"
BUDGET = 16


@pytest.fixture(scope="module")
def asked():
    """Signals of held-out pictures, the embedded question about each, and the patches that it is
    about.
    """
    clip, tokenizer = load_clip(FOLDER / TEXT_ENCODER)
    pictures = Pictures.of("test", 120)
    places, texts, targets = [], [], []
    for place, scene in enumerate(pictures.scenes):
        question = ask(scene, ("attribute", "object", "digit")[place % 3], scene.generator)
        if question and question.targets:
            places.append(place)
            texts.append(question.text)
            targets.append(list(question.targets))
    with torch.inference_mode():
        signals = signals_of(clip, pixels(pictures.images, "cpu"))
        embedded = towers.encode(clip, towers.tokens(tokenizer, texts))
    assert len(places) > 60
    return clip, {name: signals[name][places] for name in ("metric", "saliency")}, embedded, targets


def relevance(asked, sign, texts=None):
    clip, signals, embedded, _ = asked
    embedded = embedded if texts is None else texts
    with torch.inference_mode():
        norm, projection = clip.vision_model.post_layernorm, clip.visual_projection
        return clip_relevance(signals["metric"], embedded, norm, projection, sign)


def pointing(asked, sign):
    """Mean AUC of the relevance on the patches asked about."""
    found = [
        towers.auc(row, target)
        for row, target in zip(relevance(asked, sign), asked[3], strict=True)
    ]
    return sum(found) / len(found)


def kept(asked, sign, texts=None):
    """Share of the patches asked about that served FSR keeps; `texts` instead of the questions."""
    _, signals, _, targets = asked
    tokens = VisualTokens(
        signals["metric"], saliency=signals["saliency"], relevance=relevance(asked, sign, texts)
    )
    indices = get_method("fsr", **SERVED_DEFAULTS["fsr"]).prune(tokens, BUDGET).indices.tolist()
    shares = [
        len({*row} & {*target}) / len(target) for row, target in zip(indices, targets, strict=True)
    ]
    return sum(shares) / len(shares)


def test_the_tower_is_inverted_and_says_so(asked):
    report = json.loads((FOLDER / "training.json").read_text())
    assert report["recipe"]["plain"] and report["gates"]["relevance"] < 0.4
    assert stated_sign(FOLDER) == report["sign"] == -1
    assert pointing(asked, 1) < 0.4


def test_with_the_stated_sign_relevance_points_at_what_is_asked_about(asked):
    assert pointing(asked, stated_sign(FOLDER)) > 0.6


def test_fsr_keeps_more_of_it_than_with_the_other_sign(asked):
    assert kept(asked, stated_sign(FOLDER)) > kept(asked, -stated_sign(FOLDER)) + 0.1


def test_it_is_the_question_and_not_only_the_foreground(asked):
    # Things alone, whatever is asked, would do as well with the question about another picture.
    assert kept(asked, -1) > kept(asked, -1, asked[2].roll(1, 0)) + 0.05


def test_short_phrases_are_inverted_too():
    clip, tokenizer = load_clip(FOLDER / TEXT_ENCODER)
    pictures = Pictures.of("test", 60)
    found = []
    with torch.inference_mode():
        maps = F.normalize(towers.look(clip, pixels(pictures.images, "cpu"))[1][0], dim=-1)
        for scene, rows in zip(pictures.scenes, maps, strict=True):
            texts = towers.encode(
                clip, towers.tokens(tokenizer, [f"a {thing.name}" for thing in scene.things])
            )
            for thing, text in zip(scene.things, texts, strict=True):
                found.append(towers.auc(rows @ text, list(patches(thing.box))))
    assert len(found) > 60 and sum(found) / len(found) < 0.4


def test_the_plugin_reads_the_sign_where_it_is_stated():
    vision = SimpleNamespace(hidden_size=towers.WIDTH)
    model = SimpleNamespace(model=str(FOLDER), hf_config=SimpleNamespace(vision_config=vision))
    assert find_encoder(model, "auto", "auto") == (str(FOLDER / TEXT_ENCODER), -1)
    assert find_encoder(model, "auto", 1)[1] == 1
