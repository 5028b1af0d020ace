"""Signals of the testbed's own tower, formed as the server forms them, and its codebook."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fsr_vllm.methods import get_method
from fsr_vllm.methods.prototypes import build_prototypes
from fsr_vllm.signals.saliency import attention_map, cls_attention, received_attention

from . import towers
from .captions import regions_of
from .data import pixels
from .scenes import render, scene


def signals_of(clip: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What the server's tap reads off the tower, by the same functions: images (B, 3, 96, 96)."""
    tower: Any = clip
    states = tower.vision_model(pixel_values=images, output_hidden_states=True).hidden_states

    def query_key(layer: int) -> tuple[Tensor, Tensor]:
        block = tower.vision_model.encoder.layers[layer]
        normed = block.layer_norm1(states[layer])
        return block.self_attn.q_proj(normed), block.self_attn.k_proj(normed)

    last, scale = towers.LAYERS - 2, (towers.WIDTH // towers.HEADS) ** -0.5
    query, key = query_key(last)

    def saliency(layer: int) -> Tensor:
        return cls_attention(*query_key(layer), towers.HEADS, scale) / towers.HEADS

    def received(layer: int) -> Tensor:
        return (
            received_attention(*query_key(layer), towers.HEADS, scale, 1, prefix_gives=True)
            / towers.HEADS
        )

    found = {
        "metric": states[-2][:, 1:],
        "cls_row": states[-2][:, 0],
        "saliency": saliency(last),
        "received": received(last),
        "attention": attention_map(query, key, towers.HEADS, scale) / towers.HEADS,
        "keys": key[:, 1:].unflatten(2, (towers.HEADS, -1)).mean(2),
        "last_query": query[:, 0],
        "last_key": key,
    }
    for name, signal, form in (
        ("hiprune", "shallow_received", received),
        ("vscan", "shallow_saliency", saliency),
    ):
        layer = min(last, round(get_method(name).shallow_layer * towers.LAYERS / 24))
        found[f"{signal}@{name}"] = form(layer)
    return found


@torch.inference_mode()
def codebook(clip: Any, reader: Any, count: int = 128) -> Tensor:
    """A codebook for method "codebook", from training scenes: rows of patches that show background
    alone.

    The original finds redundant rows by asking a large language model about each; on scenes that we
    drew ourselves it is known which rows show nothing that is asked about.
    """
    rows = []
    for one in (scene("train", index) for index in range(count)):
        background = regions_of(0, one)[-1][3]
        state = clip.vision_model(
            pixel_values=pixels(render(one)[None], clip.device), output_hidden_states=True
        ).hidden_states[-2]
        rows.append(reader.project(state[0, 1:])[list(background)].cpu())
    return build_prototypes(rows, clusters_per_image=4, clusters=32, min_images=8)
