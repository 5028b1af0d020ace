"""Small random checkpoints in the published layouts: LLaVA-1.5 with its CLIP text tower, LLaVA on
SigLIP, plain Llama.

They are real models in all but training: vLLM and transformers load them, and answers depend on the
picture and the question, but mean nothing. Key names are those of the published checkpoints
(transformers 5 saves others, which vLLM refuses). Every tensor is drawn from the seed and its own
name: the same seed writes the same bytes, and no tensor changes when another one is added.
"""

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from .wording import (
    CLIP_BOS,
    CLIP_EOS,
    CLIP_LENGTH,
    IMAGE,
    special_ids,
    words,
    write_clip_tokenizer,
    write_json,
    write_tokenizer,
)

Weights = dict[str, Tensor]

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def build_checkpoint(
    path: str | Path,
    *,
    seed: int = 0,
    image_size: int = 336,
    patch_size: int = 14,
    vision_hidden_size: int = 64,
    vision_layers: int = 4,
    hidden_size: int = 64,
    layers: int = 4,
    heads: int = 4,
    text_encoder: bool = True,
    relevance_sign: int | None = None,
) -> Path:
    """Write a LLaVA-1.5 checkpoint with a CLIP tower, and its CLIP under text_encoder/; layer -2
    feeds the projector.

    `relevance_sign` becomes `fsr_relevance_sign` in the text encoder's config.json. The image gives
    (image_size / patch_size) squared tokens.
    """
    vision = _vision_config(
        "clip_vision_model", image_size, patch_size, vision_hidden_size, vision_layers, heads
    )
    vision |= {"hidden_act": "quick_gelu", "projection_dim": 48}
    tower = _vision_weights(vision, seed)
    _write_llava(Path(path), vision, tower, _text_config(hidden_size, layers, heads), seed)
    if text_encoder:
        _write_clip(Path(path) / "text_encoder", vision, tower, heads, seed, relevance_sign)
    return Path(path)


def build_clip_less(
    path: str | Path, *, seed: int = 0, image_size: int = 224, patch_size: int = 16
) -> Path:
    """Write a LLaVA checkpoint whose tower is a SigLIP: no [CLS], and no text encoder beside it."""
    vision = _vision_config("siglip_vision_model", image_size, patch_size, 64, 4, 4)
    vision |= {"hidden_act": "gelu_pytorch_tanh", "vision_use_head": False}
    _write_llava(Path(path), vision, _vision_weights(vision, seed), _text_config(64, 4, 4), seed)
    return Path(path)


def build_text_model(
    path: str | Path, *, seed: int = 0, hidden_size: int = 64, layers: int = 2, heads: int = 4
) -> Path:
    """Write a Llama checkpoint without any tower, with the same tokenizer and chat template."""
    path, config = Path(path), _text_config(hidden_size, layers, heads)
    tokenizer = write_tokenizer(path)
    config |= {"architectures": ["LlamaForCausalLM"], "vocab_size": tokenizer.get_vocab_size()}
    save_checkpoint(path, config | special_ids(tokenizer), _llama_weights(config, tokenizer, seed))
    return path


def _write_llava(
    path: Path, vision: dict[str, Any], tower: Weights, text: dict[str, Any], seed: int
) -> None:
    tokenizer = write_tokenizer(path)
    text = text | {"vocab_size": tokenizer.get_vocab_size()} | special_ids(tokenizer)
    clip = vision["model_type"] == "clip_vision_model"
    selection = {"vision_feature_select_strategy": "default" if clip else "full"}
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": tokenizer.token_to_id(IMAGE),
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision,
    }
    weights = {f"vision_tower.vision_model.{name}": tensor for name, tensor in tower.items()}
    weights |= {
        f"language_model.{name}": tensor
        for name, tensor in _llama_weights(text, tokenizer, seed).items()
    }
    projector = "multi_modal_projector"
    weights |= _linear(f"{projector}.linear_1", text["hidden_size"], vision["hidden_size"], seed)
    weights |= _linear(
        f"{projector}.linear_2", text["hidden_size"], text["hidden_size"], seed, gain=2.0
    )
    save_checkpoint(path, config | selection, weights)
    write_json(path / "preprocessor_config.json", image_processor(vision))
    processor = {
        "patch_size": vision["patch_size"],
        "num_additional_image_tokens": int(clip),
        "image_token": IMAGE,
    }
    write_json(
        path / "processor_config.json",
        {"processor_class": "LlavaProcessor"} | processor | selection,
    )


def _write_clip(
    path: Path, vision: dict[str, Any], tower: Weights, heads: int, seed: int, sign: int | None
) -> None:
    """The whole CLIPModel that the tower belongs to, as published: text side, both projections, and
    the tower again.
    """
    tokenizer = write_clip_tokenizer(path)
    bos, eos = tokenizer.token_to_id(CLIP_BOS), tokenizer.token_to_id(CLIP_EOS)
    text = {
        "model_type": "clip_text_model",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu",
        "max_position_embeddings": CLIP_LENGTH,
        "projection_dim": vision["projection_dim"],
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": vision["projection_dim"],
    }
    config |= {"text_config": text, "vision_config": vision}
    if sign is not None:
        config["fsr_relevance_sign"] = sign
    width = text["hidden_size"]
    weights = {f"vision_model.{name}": tensor for name, tensor in tower.items()} | {
        "text_model.embeddings.token_embedding.weight": _normal(
            "clip.tokens", (text["vocab_size"], width), seed
        ),
        "text_model.embeddings.position_embedding.weight": _normal(
            "clip.positions", (CLIP_LENGTH, width), seed, 0.3
        ),
        "text_projection.weight": _normal(
            "clip.text", (text["projection_dim"], width), seed, width**-0.5
        ),
        "visual_projection.weight": _normal(
            "clip.visual",
            (text["projection_dim"], vision["hidden_size"]),
            seed,
            vision["hidden_size"] ** -0.5,
        ),
        "logit_scale": torch.tensor(4.6052),
    }
    weights |= _encoder("text_model.encoder", text, seed) | _norm(
        "text_model.final_layer_norm", width
    )
    save_checkpoint(path, config, weights)


def _vision_config(
    kind: str, image: int, patch: int, hidden: int, layers: int, heads: int
) -> dict[str, Any]:
    if image % patch:
        raise ValueError(f"an image of {image} pixels does not divide into patches of {patch}")
    return {
        "model_type": kind,
        "image_size": image,
        "patch_size": patch,
        "num_channels": 3,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _text_config(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": max(32, hidden // heads),  # vLLM's CPU attention knows no heads below 32
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def image_processor(vision: dict[str, Any]) -> dict[str, Any]:
    """The preprocessor_config.json that goes with a tower: resize and crop to its square, CLIP's or
    SigLIP's scale.
    """
    side = vision["image_size"]
    square = {"height": side, "width": side}
    common = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
    }
    if vision["model_type"] == "clip_vision_model":
        crop = {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square}
        scale = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
        return {"image_processor_type": "CLIPImageProcessor"} | scale | common | crop
    half = [0.5, 0.5, 0.5]
    # LlavaProcessor asks for crop_size also where nothing is cropped.
    siglip = {"image_mean": half, "image_std": half, "size": square, "crop_size": square}
    return {"image_processor_type": "SiglipImageProcessor"} | siglip | common


def _vision_weights(config: dict[str, Any], seed: int) -> Weights:
    """A tower's weights without prefix; the class token is what tells a CLIP from a SigLIP."""
    clip = config["model_type"] == "clip_vision_model"
    width, patch = config["hidden_size"], config["patch_size"]
    positions = (config["image_size"] // patch) ** 2 + clip
    weights = _encoder("encoder", config, seed) | _norm("post_layernorm", width)
    weights["embeddings.position_embedding.weight"] = _normal(
        "vision.positions", (positions, width), seed, 0.3
    )
    # Neighbouring pixels are alike, so that a patch adds up nearly coherently: unit output needs no
    # larger weights.
    shape = (width, 3, patch, patch)
    weights["embeddings.patch_embedding.weight"] = _normal(
        "vision.patch", shape, seed, (3 * patch * patch) ** -0.5
    )
    if clip:
        weights["embeddings.class_embedding"] = _normal("vision.class", (width,), seed)
        return weights | _norm("pre_layrnorm", width)
    weights["embeddings.patch_embedding.bias"] = torch.zeros(width)
    return weights


def _encoder(prefix: str, config: dict[str, Any], seed: int) -> Weights:
    """CLIP's (and SigLIP's) transformer layers, peaked enough that [CLS] attention has CLIP-L's
    entropy.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    weights: Weights = {}
    for i in range(config["num_hidden_layers"]):
        layer = f"{prefix}.layers.{i}"
        for name, gain in (("q_proj", 2.0), ("k_proj", 2.0), ("v_proj", 1.0), ("out_proj", 1.0)):
            weights |= _linear(f"{layer}.self_attn.{name}", width, width, seed, gain)
        weights |= _linear(f"{layer}.mlp.fc1", inner, width, seed) | _linear(
            f"{layer}.mlp.fc2", width, inner, seed
        )
        weights |= _norm(f"{layer}.layer_norm1", width) | _norm(f"{layer}.layer_norm2", width)
    return weights


def _llama_weights(config: dict[str, Any], tokenizer: Tokenizer, seed: int) -> Weights:
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
    weights = {"model.embed_tokens.weight": _normal("llama.tokens", (vocab, width), seed)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, (rows, columns, gain) in shapes.items():
            weights |= _linear(f"{layer}.{name}", rows, columns, seed, gain, bias=False)
        weights |= _norm(f"{layer}.input_layernorm", width, bias=False)
        weights |= _norm(f"{layer}.post_attention_layernorm", width, bias=False)
    # Logit 0 for special tokens and pieces of words: answers then are words, and as long as they
    # were asked to be.
    spoken = torch.zeros(vocab, 1).index_fill(0, torch.tensor(words(tokenizer)), 3.0 * width**-0.5)
    head = _normal("llama.head", (vocab, width), seed) * spoken
    return weights | _norm("model.norm", width, bias=False) | {"lm_head.weight": head}


def _linear(
    name: str, rows: int, columns: int, seed: int, gain: float = 1.0, bias: bool = True
) -> Weights:
    weights = {f"{name}.weight": _normal(name, (rows, columns), seed, gain * columns**-0.5)}
    return weights | ({f"{name}.bias": torch.zeros(rows)} if bias else {})


def _norm(name: str, width: int, bias: bool = True) -> Weights:
    return {f"{name}.weight": torch.ones(width)} | (
        {f"{name}.bias": torch.zeros(width)} if bias else {}
    )


def _normal(name: str, shape: Iterable[int], seed: int, std: float = 1.0) -> Tensor:
    # A digest of 32 bits, for torch's CPU generator ignores what is above.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randn(tuple(shape), generator=generator) * std


def save_checkpoint(path: Path, config: dict[str, Any], weights: Weights) -> None:
    """Write config.json, with the dtype of the weights, and model.safetensors."""
    path.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    write_json(path / "config.json", config | {"dtype": dtype})
    (path / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
