"""A model folder with the sizes of LLaVA-1.5-7B and its CLIP, without weights: for `--load-format
dummy`.

Times and memory are the real model's, what it says means nothing. The tokenizers are the testbed's,
trained on the fly, so the vocabularies have hundreds of entries instead of tens of thousands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.testbed.checkpoint import image_processor
from benchmarks.testbed.wording import (
    CLIP_BOS,
    CLIP_EOS,
    CLIP_LENGTH,
    IMAGE,
    special_ids,
    write_clip_tokenizer,
    write_json,
    write_tokenizer,
)

DTYPE = "bfloat16"
_SELECTION = {"vision_feature_select_strategy": "default"}
_TOWER = {
    "model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "num_channels": 3,
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads":
    16, "hidden_act": "quick_gelu", "projection_dim": 768,
}  # fmt: skip
_LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
_CLIP_TEXT = {
    "model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu",
    "max_position_embeddings": CLIP_LENGTH, "projection_dim": 768,
}  # fmt: skip


def llava_7b(path: Path) -> Path:
    """Write the folder; --fsr-text-encoder auto finds text_encoder/ in it."""
    tokenizer = write_tokenizer(path)
    text = _LLAMA | {"vocab_size": tokenizer.get_vocab_size()} | special_ids(tokenizer)
    config: dict[str, Any] = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": DTYPE,
        "image_token_index": tokenizer.token_to_id(IMAGE),
        "image_seq_length": 576,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": _TOWER,
    }
    write_json(path / "config.json", config | _SELECTION)
    write_json(path / "preprocessor_config.json", image_processor(_TOWER))
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "num_additional_image_tokens": 1,
    }
    write_json(path / "processor_config.json", processor | {"image_token": IMAGE} | _SELECTION)
    _write_clip(path / "text_encoder")
    return path


def _write_clip(path: Path) -> None:
    tokenizer = write_clip_tokenizer(path)
    bos, eos = tokenizer.token_to_id(CLIP_BOS), tokenizer.token_to_id(CLIP_EOS)
    text = _CLIP_TEXT | {"vocab_size": tokenizer.get_vocab_size()}
    text |= {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
    config: dict[str, Any] = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 768,
    }
    write_json(
        path / "config.json",
        config | {"dtype": DTYPE, "text_config": text, "vision_config": _TOWER},
    )
