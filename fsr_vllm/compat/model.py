"""The vision tower, a second set of weights, and the language model's embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def tower_attentions(vision_tower: nn.Module) -> list[nn.Module]:
    """The attention ops of a CLIP tower's computed blocks: called with (query, key, value), each
    (B, 1+N, heads*dim).

    Why: it sees the q and k vLLM computed anyway, behind LoRA wrappers and quantisation. Attributes
    num_heads, head_size and scale are the local ones under tensor parallelism. Read in 0.26-0.33.
    """
    return [block.self_attn.attn for block in vision_tower.vision_model.encoder.layers]  # type: ignore[union-attr]


def weight_source(path: str, revision: str | None, prefix: str) -> Any:
    """A second checkpoint that the default loader reads after the model's own (as vLLM's ultravox
    does).
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    return DefaultModelLoader.Source(path, revision=revision, prefix=prefix)


def load_parameter(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Fill a parameter by its loader: while weights are reloaded vLLM puts one there, and a copy
    would be lost.
    """
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)


def embed_text_ids(language_model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The language model's input embeddings of token ids."""
    return language_model.embed_input_ids(ids)  # type: ignore[operator]


def tokenizer_of(model_config: Any) -> Any:
    """The served model's tokenizer. Import path in 0.26-0.33."""
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(model_config)
