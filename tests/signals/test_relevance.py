"""Relevance: chunking, the joint space of CLIP, the sign of a tower, and which text encoder belongs
to it.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPConfig, CLIPModel

from fsr_vllm.signals.relevance import (
    clip_relevance,
    embedding_relevance,
    known_partner,
    pool_chunks,
    relevance_sign,
    wrap_chunks,
)

BOS, EOS = 1000, 1001


@settings(deadline=None)
@given(st.lists(st.integers(0, 999), max_size=300), st.integers(3, 80))
def test_chunks_hold_all_ids_in_order(ids, max_length):
    chunks = wrap_chunks(ids, BOS, EOS, max_length)
    assert [i for chunk in chunks for i in chunk[1:-1]] == ids
    assert all(
        chunk[0] == BOS and chunk[-1] == EOS and len(chunk) <= max_length for chunk in chunks
    )
    assert all(len(chunk) == max_length for chunk in chunks[:-1])
    assert len(chunks) == 1 or len(chunks[-1]) > 2


def test_chunks_of_nothing_and_without_room():
    assert wrap_chunks([], BOS, EOS) == [[BOS, EOS]]
    assert [len(c) for c in wrap_chunks(range(76), BOS, EOS)] == [77, 3]
    with pytest.raises(ValueError, match="max_length must be at least 3, got 2"):
        wrap_chunks([1], BOS, EOS, max_length=2)


def test_pooling_weighs_chunks_equally_and_returns_a_unit_vector():
    pooled = pool_chunks(torch.tensor([[10.0, 0.0], [0.0, 0.1]], dtype=torch.float64))
    torch.testing.assert_close(pooled, torch.full((2,), 0.5**0.5))
    one = torch.randn(1, 7)
    torch.testing.assert_close(pool_chunks(one), one[0] / one.norm())
    for bad in (torch.zeros(3), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match="at least one chunk"):
            pool_chunks(bad)


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    small = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"hidden_size": 32, "vocab_size": 99}
    vision = small | {"hidden_size": 48, "image_size": 28, "patch_size": 14}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return CLIPModel(config).eval()


def test_clip_relevance_of_cls_is_clips_own_similarity(clip):
    """On the last layer's [CLS], what layernorm and projection were trained for, the map is CLIP's
    own logit.
    """
    pixels, ids = torch.randn(2, 3, 28, 28), torch.tensor([[5, 6, 7, 98]])
    with torch.no_grad():
        out = clip(input_ids=ids, pixel_values=pixels)
        rows = clip.vision_model(pixels).last_hidden_state
        ours = clip_relevance(
            rows, out.text_embeds[0], clip.vision_model.post_layernorm, clip.visual_projection, 1
        )
    assert ours.shape == (2, 5)
    torch.testing.assert_close(
        ours[:, 0], out.logits_per_image[:, 0] / clip.logit_scale.exp(), atol=1e-5, rtol=0
    )


def test_sign_text_per_image_and_scale(clip):
    features, text = torch.randn(2, 5, 48), torch.randn(2, 24)
    modules = clip.vision_model.post_layernorm, clip.visual_projection
    with torch.no_grad():
        plus = clip_relevance(features, text, *modules, sign=1)
        torch.testing.assert_close(clip_relevance(features, text, *modules, sign=-1), -plus)
        torch.testing.assert_close(clip_relevance(features, 7 * text, *modules, sign=1), plus)
        for i in range(2):
            torch.testing.assert_close(
                clip_relevance(features[i : i + 1], text[i], *modules, sign=1)[0], plus[i]
            )


def test_half_precision_modules_score_in_float32():
    norm, projection = nn.LayerNorm(48).bfloat16(), nn.Linear(48, 24, bias=False).bfloat16()
    features, text = torch.randn(1, 5, 48).bfloat16(), torch.randn(24).bfloat16()
    with torch.no_grad():
        out = clip_relevance(features, text, norm, projection, 1)
        exact = clip_relevance(features.float(), text.float(), norm.float(), projection.float(), 1)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, exact, atol=1e-6, rtol=0)


def test_embedding_relevance_is_the_cosine():
    features, text = torch.randn(3, 4, 8), torch.randn(3, 8)
    expected = torch.cosine_similarity(features, text[:, None], dim=-1)
    torch.testing.assert_close(embedding_relevance(features, text), expected)
    torch.testing.assert_close(embedding_relevance(features, text, sign=-1), -expected)
    torch.testing.assert_close(embedding_relevance(features, text[0])[0], expected[0])
    zero = embedding_relevance(
        torch.zeros(1, 4, 8), torch.zeros(8)
    )  # an empty mean of embeddings: no NaN
    assert torch.equal(zero, torch.zeros(1, 4))


@pytest.mark.parametrize("text", [(7,), (2, 8), (3, 4, 8), (1, 8)])
def test_text_of_another_shape_is_refused(text):
    with pytest.raises(ValueError, match="text"):
        embedding_relevance(torch.zeros(3, 4, 8), torch.zeros(text))


def test_features_of_another_shape_and_bad_signs_are_refused(clip):
    modules = clip.vision_model.post_layernorm, clip.visual_projection
    with pytest.raises(ValueError, match="features"):
        clip_relevance(torch.zeros(1, 5, 47), torch.zeros(24), *modules, sign=1)
    with pytest.raises(ValueError, match="features"):
        embedding_relevance(torch.zeros(5, 8), torch.zeros(8))
    for sign in (0, 2, True, "1"):
        with pytest.raises(ValueError, match="sign"):
            embedding_relevance(torch.zeros(1, 5, 8), torch.zeros(8), sign=sign)


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        ("openai/clip-vit-large-patch14-336", -1),
        ("OpenAI/CLIP-ViT-B-32", -1),
        ("/models/openai/clip-vit-base-patch16/", -1),
        ("C:\\models\\openai\\clip-vit-base-patch16", -1),
        ("/cache/hub/models--openai--clip-vit-large-patch14-336/snapshots/ce19dc912ca5cd21", -1),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", 1),
        ("models--laion--clip-vit-large/snapshots/0", 1),
        ("google/siglip-so400m-patch14-384", 1),
        ("someone/openai/other", 1),
        ("clip-vit-large-patch14-336", 1),
        ("", 1),
        (None, 1),
    ],
)
def test_automatic_sign_by_name(name, sign):
    assert relevance_sign("auto", name, None) == sign


def test_setting_beats_config_beats_name():
    openai = "openai/clip-vit-large-patch14-336"
    assert relevance_sign("auto", openai, 1) == 1
    assert relevance_sign("auto", None, -1) == -1
    for setting in ("1", 1):
        assert relevance_sign(setting, openai, -1) == 1
    for setting in ("-1", -1):
        assert relevance_sign(setting, None, 1) == -1


@pytest.mark.parametrize("setting", ["", "Auto", "+1", "0", 0, 2, True, None, 1.0])
def test_bad_sign_settings_are_refused(setting):
    with pytest.raises(ValueError, match="sign"):
        relevance_sign(setting, None, None)


@pytest.mark.parametrize("stated", [0, 2, True, "1", 0.5])
def test_bad_signs_in_a_config_are_refused(stated):
    with pytest.raises(ValueError, match="fsr_relevance_sign"):
        relevance_sign("auto", None, stated)


LARGE_336 = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "num_hidden_layers": 24}
BASE_224 = {"image_size": 224, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "openai/clip-vit-large-patch14-336"),
        (
            {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"},
            "openai/clip-vit-large-patch14-336",
        ),
        ({"image_size": 224}, "openai/clip-vit-large-patch14"),
        (BASE_224, "openai/clip-vit-base-patch16"),
        (BASE_224 | {"patch_size": 32}, "openai/clip-vit-base-patch32"),
        ({"hidden_size": 64}, None),
        ({"image_size": [336, 336]}, None),
        ({"model_type": "siglip_vision_model"}, None),
        ({"hidden_act": "gelu"}, None),
    ],
)
def test_known_partner(change, name):
    assert known_partner(LARGE_336 | change) == name
    assert known_partner(SimpleNamespace(**LARGE_336 | change)) == name


def test_no_partner_for_a_config_of_another_kind():
    assert known_partner({}) is None
    assert known_partner(object()) is None
