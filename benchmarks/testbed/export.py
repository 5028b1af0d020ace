"""The trained testbed model as a LLaVA-1.5 checkpoint with its CLIP under text_encoder/, and back
from there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import CLIPModel

from fsr_vllm.demo import demo_model

from . import language, towers
from .checkpoint import image_processor
from .language import Reader, Wording
from .questions import vocabulary
from .scenes import PATCH, PATCHES, SIDE
from .tensors import Weights, save_checkpoint
from .wording import (
    CLIP_LENGTH,
    IMAGE,
    special_ids,
    write_clip_tokenizer,
    write_json,
    write_tokenizer,
)

TEXT_ENCODER = "text_encoder"
SHIPPED = demo_model()


def tokenizers(folder: Path) -> tuple[Wording, Tokenizer]:
    """Write both tokenizers to where the checkpoint will stand; the language model's and CLIP's."""
    return Wording(write_tokenizer(folder, vocabulary())), write_clip_tokenizer(
        folder / TEXT_ENCODER, vocabulary()
    )


def save_clip(folder: Path, model: CLIPModel, sign: int) -> None:
    """CLIP's weights and config in half precision; `sign` as `fsr_relevance_sign`."""
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": towers.JOINT}
    text, vision = _plain(model.config.text_config.to_dict()), _vision(model)
    config |= {"text_config": text, "vision_config": vision, "fsr_relevance_sign": sign}
    save_checkpoint(folder, config, _half(model.state_dict()))
    write_json(folder / "preprocessor_config.json", image_processor(vision))


def save(folder: Path, model: CLIPModel, reader: Reader, wording: Wording) -> None:
    """The whole LLaVA checkpoint: config, weights, processor; the tokenizer is there already."""
    vision = _vision(model)
    text = {
        "model_type": "llama", "vocab_size": wording.tokenizer.get_vocab_size(), "hidden_act":
        "silu", "hidden_size": language.WIDTH, "intermediate_size": 3 * language.WIDTH,
        "num_hidden_layers": language.LAYERS, "num_attention_heads": language.HEADS,
        "num_key_value_heads": language.HEADS, "head_dim": language.WIDTH // language.HEADS,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    selection = {"vision_feature_select_strategy": "default"}
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "projector_hidden_act": "gelu", "image_token_index": wording.tokenizer.token_to_id(IMAGE),
        "image_seq_length": PATCHES, "vision_feature_layer": -2, "tie_word_embeddings": False,
        "vision_config": vision, "text_config": text | special_ids(wording.tokenizer),
    }  # fmt: skip
    weights = {
        f"vision_tower.{n}": t
        for n, t in model.state_dict().items()
        if n.startswith("vision_model.")
    }
    weights |= {
        f"language_model.{name}": tensor for name, tensor in reader.llama.state_dict().items()
    }
    for linear in ("linear_1", "linear_2"):
        projector = getattr(reader, linear).state_dict()
        weights |= {
            f"multi_modal_projector.{linear}.{name}": tensor for name, tensor in projector.items()
        }
    save_checkpoint(folder, config | selection, _half(weights))
    write_json(folder / "preprocessor_config.json", image_processor(vision))
    processor = {"patch_size": PATCH, "num_additional_image_tokens": 1, "image_token": IMAGE}
    write_json(
        folder / "processor_config.json",
        {"processor_class": "LlavaProcessor"} | processor | selection,
    )


def load(folder: Path = SHIPPED) -> tuple[CLIPModel, Reader, Wording, Tokenizer]:
    """CLIP, reader and both tokenizers of a saved checkpoint, in float32, ready to be read from."""
    model, clip_tokenizer = load_clip(folder / TEXT_ENCODER)
    wording = Wording(Tokenizer.from_file(str(folder / "tokenizer.json")))
    reader = Reader(towers.WIDTH, wording.tokenizer.get_vocab_size(), 0)
    weights = load_file(folder / "model.safetensors")
    names = {"language_model.": "llama.", "multi_modal_projector.": ""}
    mine = {
        new + n.removeprefix(old): t.float()
        for n, t in weights.items()
        for old, new in names.items()
        if old in n
    }
    reader.load_state_dict(mine)
    return model, reader.eval(), wording, clip_tokenizer


def load_clip(folder: Path) -> tuple[CLIPModel, Tokenizer]:
    """A saved CLIP in float32, and its tokenizer."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = towers.build(tokenizer, 0)
    model.load_state_dict(
        {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    )
    return model.eval(), tokenizer


def stated_sign(folder: Path = SHIPPED) -> int:
    """The relevance sign that a saved checkpoint states."""
    return int(
        json.loads((folder / TEXT_ENCODER / "config.json").read_text())["fsr_relevance_sign"]
    )


def _vision(model: CLIPModel) -> dict[str, Any]:
    vision = _plain(model.config.vision_config.to_dict())
    assert vision["image_size"] == SIDE and vision["patch_size"] == PATCH
    return vision


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Only what tells a tower from another; transformers' full dictionary differs from release to
    release.
    """
    kept = (
        "model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "hidden_act", "projection_dim", "layer_norm_eps", "image_size",
        "patch_size", "num_channels", "max_position_embeddings", "vocab_size", "bos_token_id",
        "eos_token_id", "pad_token_id",
    )  # fmt: skip
    assert config.get("max_position_embeddings", CLIP_LENGTH) == CLIP_LENGTH
    return {name: config[name] for name in kept if name in config}


def _half(weights: Weights) -> Weights:
    return {name: t.half().contiguous() for name, t in weights.items() if t.is_floating_point()}
