"""Small random checkpoints in the published layouts: LLaVA-1.5 with its CLIP text tower, LLaVA on
SigLIP, plain Llama.

They are real models in all but training: vLLM and transformers load them, and answers depend on the
picture and the question, but mean nothing. Key names are those of the published checkpoints
(transformers 5 saves others, which vLLM refuses). Every tensor is drawn from the seed and its own
name: the same seed writes the same bytes, and no tensor changes when another one is added.
"""

from pathlib import Path
from typing import Any

import torch

from .tensors import (
    Weights,
    encoder,
    linear,
    llama_weights,
    norm,
    normal,
    save_checkpoint,
    vision_weights,
)
from .wording import (
    CLIP_BOS,
    CLIP_EOS,
    CLIP_LENGTH,
    IMAGE,
    special_ids,
    write_clip_tokenizer,
    write_json,
    write_tokenizer,
)

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
    tower = vision_weights(vision, seed)
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
    _write_llava(Path(path), vision, vision_weights(vision, seed), _text_config(64, 4, 4), seed)
    return Path(path)


def build_text_model(
    path: str | Path, *, seed: int = 0, hidden_size: int = 64, layers: int = 2, heads: int = 4
) -> Path:
    """Write a Llama checkpoint without any tower, with the same tokenizer and chat template."""
    path, config = Path(path), _text_config(hidden_size, layers, heads)
    tokenizer = write_tokenizer(path)
    config |= {"architectures": ["LlamaForCausalLM"], "vocab_size": tokenizer.get_vocab_size()}
    save_checkpoint(path, config | special_ids(tokenizer), llama_weights(config, tokenizer, seed))
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
        for name, tensor in llama_weights(text, tokenizer, seed).items()
    }
    projector = "multi_modal_projector"
    weights |= linear(f"{projector}.linear_1", text["hidden_size"], vision["hidden_size"], seed)
    weights |= linear(
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
        "text_model.embeddings.token_embedding.weight": normal(
            "clip.tokens", (text["vocab_size"], width), seed
        ),
        "text_model.embeddings.position_embedding.weight": normal(
            "clip.positions", (CLIP_LENGTH, width), seed, 0.3
        ),
        "text_projection.weight": normal(
            "clip.text", (text["projection_dim"], width), seed, width**-0.5
        ),
        "visual_projection.weight": normal(
            "clip.visual",
            (text["projection_dim"], vision["hidden_size"]),
            seed,
            vision["hidden_size"] ** -0.5,
        ),
        "logit_scale": torch.tensor(4.6052),
    }
    weights |= encoder("text_model.encoder", text, seed) | norm(
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
