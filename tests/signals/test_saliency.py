"""Saliency equals what transformers' eager attention reports, whole or by tensor-parallel shares of
the heads.
"""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from fsr_vllm.signals import saliency
from fsr_vllm.signals.saliency import attention_map, cls_attention, received_attention

HEADS, DIM = 4, 8
SCALE = DIM**-0.5


@pytest.fixture(scope="module")
def layer():
    """Queries and keys of layer -2 of a small random CLIP tower, with the attention transformers
    reports for it.
    """
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=HEADS * DIM,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        image_size=56,
        patch_size=14,
        attn_implementation="eager",
    )
    model = CLIPVisionModel(config).eval()
    for (
        parameter
    ) in model.parameters():  # CLIP's own init is so small that attention would be uniform
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.5)
    with torch.no_grad():
        out = model(torch.randn(3, 3, 56, 56), output_attentions=True, output_hidden_states=True)
        block = next(m for m in model.modules() if hasattr(m, "layers")).layers[-2]
        hidden = block.layer_norm1(
            out.hidden_states[-3]
        )  # what the block that writes hidden_states[-2] reads
        query, key = block.self_attn.q_proj(hidden), block.self_attn.k_proj(hidden)
    return query, key, out.attentions[-2]


def test_cls_attention_is_transformers_eager_attention(layer):
    query, key, expected = layer
    ours = cls_attention(query, key, HEADS, SCALE) / HEADS
    assert ours.shape == (3, 16) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected[:, :, 0, 1:].mean(1), atol=1e-5, rtol=0)
    assert expected[:, :, 0, 1:].mean(1).std() > 1e-2  # a uniform map would prove nothing


def test_attention_map_is_transformers_eager_attention(layer):
    query, key, expected = layer
    torch.testing.assert_close(
        attention_map(query, key, HEADS, SCALE) / HEADS,
        expected[:, :, 1:, 1:].mean(1),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("block", [1 << 24, 500])
def test_received_attention_is_the_column_mean(layer, prefix, block, monkeypatch):
    query, key, expected = layer
    monkeypatch.setattr(saliency, "_CPU_BLOCK", block)
    torch.testing.assert_close(
        received_attention(query, key, HEADS, SCALE, prefix) / HEADS,
        expected[:, :, prefix:, prefix:].mean((1, 2)),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("block", [1 << 24, 500])
def test_received_attention_with_cls_among_the_givers(layer, block, monkeypatch):
    query, key, expected = layer
    monkeypatch.setattr(saliency, "_CPU_BLOCK", block)
    ours = received_attention(query, key, HEADS, SCALE, prefix=1, prefix_gives=True) / HEADS
    torch.testing.assert_close(ours, expected.mean((1, 2))[:, 1:], atol=1e-5, rtol=0)
    without = received_attention(query, key, HEADS, SCALE, prefix=1) / HEADS
    assert not torch.allclose(ours, without, atol=1e-3)


def given_by_all(query, key, heads, scale):
    return received_attention(query, key, heads, scale, prefix=1, prefix_gives=True)


@pytest.mark.parametrize(
    "function", [cls_attention, attention_map, received_attention, given_by_all]
)
def test_shares_of_the_heads_sum_to_the_whole(layer, function):
    query, key, _ = layer
    half = HEADS * DIM // 2
    shares = [
        function(query[..., s], key[..., s], HEADS // 2, SCALE)
        for s in (slice(half), slice(half, None))
    ]
    torch.testing.assert_close(sum(shares), function(query, key, HEADS, SCALE))


@pytest.mark.parametrize("function", [cls_attention, attention_map, received_attention])
def test_half_precision_is_scored_in_float32(layer, function):
    query, key = (x.bfloat16() for x in layer[:2])
    out = function(query, key, HEADS, SCALE)
    assert out.dtype == torch.float32
    torch.testing.assert_close(
        out, function(query.float(), key.float(), HEADS, SCALE), atol=0, rtol=0
    )


def test_images_of_a_batch_are_independent(layer):
    query, key, _ = layer
    together = cls_attention(query, key, HEADS, SCALE)
    alone = torch.cat(
        [cls_attention(q[None], k[None], HEADS, SCALE) for q, k in zip(query, key, strict=True)]
    )
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("query", "key", "heads"),
    [
        ((2, 5, 32), (2, 5, 32), 3),
        ((2, 5, 32), (2, 5, 32), 0),
        ((2, 5, 32), (2, 5, 16), 4),
        ((2, 5, 32), (1, 5, 32), 4),
        ((5, 32), (5, 32), 4),
        ((2, 1, 32), (2, 1, 32), 4),
    ],
)
def test_wrong_shapes_are_refused(query, key, heads):
    wrong = "query and key must be|does not divide into|leave no patch"
    with pytest.raises(ValueError, match=wrong):
        cls_attention(torch.zeros(query), torch.zeros(key), heads, SCALE)


def test_query_and_key_must_have_the_same_tokens():
    with pytest.raises(ValueError, match="tokens"):
        attention_map(torch.zeros(1, 4, 32), torch.zeros(1, 5, 32), HEADS, SCALE)
