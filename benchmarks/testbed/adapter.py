"""A random LoRA adapter of a small checkpoint's language model, in PEFT's layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def build_adapter(path: Path, checkpoint: Path, rank: int = 8) -> Path:
    """Write an adapter of the query projections of all layers of `checkpoint` to `path`."""
    config = json.loads((checkpoint / "config.json").read_text())["text_config"]
    width, attention = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.language_model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        weights[f"{name}.lora_B.weight"] = torch.randn(attention, rank, generator=generator)
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"], "bias":
        "none",
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(described))
    return path
