"""Random tensors under the names of published checkpoints, and how they are written."""

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from .wording import (
    words,
    write_json,
)

Weights = dict[str, Tensor]


def vision_weights(config: dict[str, Any], seed: int) -> Weights:
    """A tower's weights without prefix; the class token is what tells a CLIP from a SigLIP."""
    clip = config["model_type"] == "clip_vision_model"
    width, patch = config["hidden_size"], config["patch_size"]
    positions = (config["image_size"] // patch) ** 2 + clip
    weights = encoder("encoder", config, seed) | norm("post_layernorm", width)
    weights["embeddings.position_embedding.weight"] = normal(
        "vision.positions", (positions, width), seed, 0.3
    )
    # Neighbouring pixels are alike, so that a patch adds up nearly coherently: unit output needs no
    # larger weights.
    shape = (width, 3, patch, patch)
    weights["embeddings.patch_embedding.weight"] = normal(
        "vision.patch", shape, seed, (3 * patch * patch) ** -0.5
    )
    if clip:
        weights["embeddings.class_embedding"] = normal("vision.class", (width,), seed)
        return weights | norm("pre_layrnorm", width)
    weights["embeddings.patch_embedding.bias"] = torch.zeros(width)
    return weights


def encoder(prefix: str, config: dict[str, Any], seed: int) -> Weights:
    """CLIP's (and SigLIP's) transformer layers, peaked enough that [CLS] attention has CLIP-L's
    entropy.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    weights: Weights = {}
    for i in range(config["num_hidden_layers"]):
        layer = f"{prefix}.layers.{i}"
        for name, gain in (("q_proj", 2.0), ("k_proj", 2.0), ("v_proj", 1.0), ("out_proj", 1.0)):
            weights |= linear(f"{layer}.self_attn.{name}", width, width, seed, gain)
        weights |= linear(f"{layer}.mlp.fc1", inner, width, seed) | linear(
            f"{layer}.mlp.fc2", width, inner, seed
        )
        weights |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
    return weights


def llama_weights(config: dict[str, Any], tokenizer: Tokenizer, seed: int) -> Weights:
    """Llama's weights; attention is peaked, or answers would repeat one word whatever picture and
    question say.
    """
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    attention = config["num_attention_heads"] * config["head_dim"]
    shapes = {
        "self_attn.q_proj": (attention, width, 2.4),
        "self_attn.k_proj": (attention, width, 2.4),
        "self_attn.v_proj": (attention, width, 1.0),
        "self_attn.o_proj": (width, attention, 1.0),
        "mlp.gate_proj": (inner, width, 1.0),
        "mlp.up_proj": (inner, width, 1.0),
        "mlp.down_proj": (width, inner, 1.0),
    }
    weights = {"model.embed_tokens.weight": normal("llama.tokens", (vocab, width), seed)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, (rows, columns, gain) in shapes.items():
            weights |= linear(f"{layer}.{name}", rows, columns, seed, gain, bias=False)
        weights |= norm(f"{layer}.input_layernorm", width, bias=False)
        weights |= norm(f"{layer}.post_attention_layernorm", width, bias=False)
    # Logit 0 for special tokens and pieces of words: answers then are words, and as long as they
    # were asked to be.
    spoken = torch.zeros(vocab, 1).index_fill(0, torch.tensor(words(tokenizer)), 3.0 * width**-0.5)
    head = normal("llama.head", (vocab, width), seed) * spoken
    return weights | norm("model.norm", width, bias=False) | {"lm_head.weight": head}


def linear(
    name: str, rows: int, columns: int, seed: int, gain: float = 1.0, bias: bool = True
) -> Weights:
    weights = {f"{name}.weight": normal(name, (rows, columns), seed, gain * columns**-0.5)}
    return weights | ({f"{name}.bias": torch.zeros(rows)} if bias else {})


def norm(name: str, width: int, bias: bool = True) -> Weights:
    return {f"{name}.weight": torch.ones(width)} | (
        {f"{name}.bias": torch.zeros(width)} if bias else {}
    )


def normal(name: str, shape: Iterable[int], seed: int, std: float = 1.0) -> Tensor:
    # A digest of 32 bits, for torch's CPU generator ignores what is above.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randn(tuple(shape), generator=generator) * std


def save_checkpoint(path: Path, config: dict[str, Any], weights: Weights) -> None:
    """Write config.json, with the dtype of the weights, and model.safetensors."""
    path.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    write_json(path / "config.json", config | {"dtype": dtype})
    (path / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
