"""A real tower whose patch-text similarity is inverted, as OpenAI's CLIP has it: the sign it states sets that right.

`inverted/` was made by `python -m fsr_vllm.testbed.train --plain`; [CLS] alone was trained, patches were left to
themselves.
"""

import json
from pathlib import Path

import pytest
import torch

from fsr_vllm.methods import get_method
from fsr_vllm.methods.base import VisualTokens
from fsr_vllm.params import SERVED_DEFAULTS
from fsr_vllm.signals.relevance import clip_relevance
from fsr_vllm.testbed import towers
from fsr_vllm.testbed.bench import signals_of
from fsr_vllm.testbed.data import Pictures, pixels
from fsr_vllm.testbed.export import TEXT_ENCODER, load_clip, stated_sign
from fsr_vllm.testbed.questions import ask

FOLDER = Path(__file__).parent / "inverted"
BUDGET = 16


@pytest.fixture(scope="module")
def asked():
    """Signals of held-out pictures, the embedded question about each, and the patches that it is about."""
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


def relevance(asked, sign):
    clip, signals, embedded, _ = asked
    with torch.inference_mode():
        norm, projection = clip.vision_model.post_layernorm, clip.visual_projection
        return clip_relevance(signals["metric"], embedded, norm, projection, sign)


def pointing(asked, sign):
    """Mean AUC of the relevance on the patches asked about."""
    found = [towers.auc(row, target) for row, target in zip(relevance(asked, sign), asked[3], strict=True)]
    return sum(found) / len(found)


def kept(asked, sign):
    """Share of the patches asked about that served FSR keeps."""
    _, signals, _, targets = asked
    tokens = VisualTokens(signals["metric"], saliency=signals["saliency"], relevance=relevance(asked, sign))
    indices = get_method("fsr", **SERVED_DEFAULTS["fsr"]).prune(tokens, BUDGET).indices.tolist()
    shares = [len({*row} & {*target}) / len(target) for row, target in zip(indices, targets, strict=True)]
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
