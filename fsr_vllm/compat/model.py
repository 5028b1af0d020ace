"""The vision tower, a second set of weights, and the language model's embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fsr_vllm.compat.patching import Entry
from fsr_vllm.compat.types import Anything, ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

CLIP_ATTENTION = Entry(
    "vllm.model_executor.models.clip:CLIPAttention.forward",
    "`self.attn(query, key, value)`, each (B, 1+N, heads*dim), is called with the q and k that "
    "vLLM computes anyway, behind LoRA wrappers and quantisation. `num_heads`, `head_size` and "
    "`scale` of it are the local ones under tensor parallelism.",
    "towers hand out attention",
)
SECONDARY_WEIGHTS = Entry(
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.Source",
    "A second checkpoint, which the loader reads after the model's own (attribute "
    "`secondary_weights`, as vLLM's ultravox has it).",
    "never: vLLM's models use it",
)
WEIGHT_LOADER = Entry(
    "vllm.model_executor.model_loader.weight_utils:default_weight_loader",
    "Fills a parameter that has no loader of its own. While weights are reloaded vLLM puts one "
    "there, and a plain copy would be lost.",
    "never: vLLM's models use it",
    signature="(param, loaded_weight)",
)


def tower_attentions(vision_tower: nn.Module) -> list[nn.Module]:
    """The attention ops of a CLIP tower's computed blocks."""
    return [block.self_attn.attn for block in vision_tower.vision_model.encoder.layers]  # type: ignore[union-attr]


def weight_source(path: str, revision: str | None, prefix: str) -> Anything:
    """A second checkpoint that the default loader reads after the model's own."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    return DefaultModelLoader.Source(path, revision=revision, prefix=prefix)


def load_parameter(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Fill a parameter by its own loader."""
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)


def embed_text_ids(language_model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The language model's input embeddings of token ids."""
    return language_model.embed_input_ids(ids)  # type: ignore[operator]


def tokenizer_of(model_config: ModelConfig) -> Anything:
    """The served model's tokenizer."""
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(model_config)
