"""Signals read off the vision tower while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fsr_vllm.compat.parallel import (
    tensor_parallel_gather,
    tensor_parallel_size,
    tensor_parallel_sum,
)
from fsr_vllm.compat.types import AttentionOp
from fsr_vllm.methods import Method, MethodInfo
from fsr_vllm.signals.saliency import attention_map, cls_attention, received_attention

PUBLISHED_DEPTH = 24  # blocks of CLIP ViT-L, in which methods state their layers
SHALLOW = ("shallow_saliency", "shallow_received")  # read at a block that the method names


def shallow_key(name: str, layer: int) -> str:
    """The hook's name of a shallow signal; blocks are counted from 0, of PUBLISHED_DEPTH."""
    return f"{name}@{layer}"


def shallow_keys(method: Method | MethodInfo) -> frozenset[str]:
    """The shallow signals of a method, or of what is known of one."""
    return frozenset(
        shallow_key(name, method.shallow_layer) for name in SHALLOW if name in method.needs
    )


def tapped(names: Collection[str]) -> frozenset[str]:
    """Of the inputs that methods need, those that the hook forms while the tower runs."""
    formed = {
        name
        for name in names
        if name in ("saliency", "received", "attention", "keys") or "@" in name
    }
    return frozenset(
        formed | ({"last_query", "last_key"} if {"last_query", "last_key"} & set(names) else set())
    )


@dataclass(frozen=True)
class AttentionLayout:
    """The attention layers of a vision tower, and what their rows are."""

    layers: Sequence[torch.nn.Module]  # attention ops of the blocks that are computed, in order
    depth: int  # blocks of the whole tower, in which methods state their layers
    prefix: int = 1  # rows before the patches of each sequence: 1 where the tower has a [CLS]


class AttentionHook:
    """Forms signals from the queries and keys of attention layers while the tower runs.

    A layer that nobody asks about runs untouched. Values are reduced over heads and over the
    tensor-parallel group, so that all ranks hold the same. `shallow` are the `shallow_key`s that
    can be asked for.
    """

    def __init__(self, layout: AttentionLayout, shallow: Collection[str]) -> None:
        self._prefix = layout.prefix
        self._wanted: frozenset[str] = frozenset()
        self._signals: dict[str, Tensor] = {}
        # One row of queries each: so cheap that whoever keeps signals can have them formed always.
        cheap = (key for key in shallow if key.startswith("shallow_saliency@"))
        self.cheap = frozenset({"saliency", *cheap})
        layers = layout.layers
        layers[-1].register_forward_pre_hook(self._read_last, with_kwargs=True)
        for signal in sorted(shallow):
            layer = int(signal.partition("@")[2])
            place = min(len(layers) - 1, round(layer * layout.depth / PUBLISHED_DEPTH))
            layers[place].register_forward_pre_hook(self._reader(signal), with_kwargs=True)

    @contextlib.contextmanager
    def reading(self, wanted: frozenset[str]) -> Iterator[dict[str, Tensor]]:
        """Fill the mapping that this yields with the `wanted` signals of the run inside."""
        self._wanted, self._signals = wanted, {}
        try:
            yield self._signals
        finally:
            self._wanted, self._signals = frozenset(), {}

    def _reader(self, name: str) -> Callable[..., None]:
        form = self._received if name.startswith("shallow_received@") else cls_attention

        def read(layer: AttentionOp, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in self._wanted:
                query, key = _query_key(args, kwargs)
                summed = form(query, key, layer.num_heads, layer.scale)
                self._signals[name] = _over_heads(layer, summed)

        return read

    def _read_last(self, layer: AttentionOp, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        wanted, signals = self._wanted, self._signals
        if not wanted:
            return
        heads, scale = layer.num_heads, layer.scale
        query, key = _query_key(args, kwargs)
        for name, form in (
            ("saliency", cls_attention),
            ("received", self._received),
            ("attention", attention_map),
        ):
            if name in wanted:
                signals[name] = _over_heads(layer, form(query, key, heads, scale))
        if "keys" in wanted:
            per_head = key[:, self._prefix :].float().unflatten(2, (heads, -1))
            signals["keys"] = _over_heads(layer, per_head.sum(2))
        if {"last_query", "last_key"} & wanted:
            signals["last_query"] = _all_heads(query[:, 0])
            signals["last_key"] = _all_heads(key)

    def _received(self, query: Tensor, key: Tensor, heads: int, scale: float) -> Tensor:
        return received_attention(
            query, key, heads, scale, prefix=self._prefix, prefix_gives=bool(self._prefix)
        )


def _query_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    query, key = (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))[:2]
    return query, key


def _over_heads(layer: AttentionOp, summed: Tensor) -> Tensor:
    ranks = tensor_parallel_size()
    return (tensor_parallel_sum(summed) if ranks > 1 else summed) / (layer.num_heads * ranks)


def _all_heads(value: Tensor) -> Tensor:
    return tensor_parallel_gather(value) if tensor_parallel_size() > 1 else value
