"""The test checkpoint with its language model in 8 bits, as compressed-tensors writes it."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**EIGHT_BITS, "strategy": "channel", "dynamic": False},
            "input_activations": {**EIGHT_BITS, "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*lm_head.*"],
}


def quantise(model: Path, path: Path) -> Path:
    """Copy the checkpoint at `model` to `path`, its language model's linear layers as int8 with a
    scale per row.
    """
    shutil.copytree(model, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": SCHEME}))
    weights = load_file(path / "model.safetensors")
    for name in [
        name
        for name in weights
        if name.startswith("language_model.") and name.endswith("_proj.weight")
    ]:
        scale = weights[name].abs().amax(1, keepdim=True) / 127
        weights[name] = (weights[name] / scale).round().to(torch.int8)
        weights[name.removesuffix("weight") + "weight_scale"] = scale
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
