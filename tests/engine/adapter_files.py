"""A random LoRA adapter of the test checkpoints' language model, in PEFT's layout."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def build_adapter(
    path: Path, layers: int = 4, width: int = 64, attention: int = 128, rank: int = 8
) -> Path:
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(layers):
        name = f"base_model.model.language_model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        weights[f"{name}.lora_B.weight"] = torch.randn(attention, rank, generator=generator)
    save_file(weights, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
