"""Signals read off the vision tower while it runs, and a clock for its parts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch

from fsr_vllm.compat.parallel import (
    tensor_parallel_gather,
    tensor_parallel_size,
    tensor_parallel_sum,
)
from fsr_vllm.signals.saliency import attention_map, cls_attention, received_attention

PUBLISHED_DEPTH = 24  # blocks of CLIP ViT-L, in which methods state their layers
SHALLOW = ("shallow_saliency", "shallow_received")  # read at a block that the method names


def shallow_key(name: str, layer: int) -> str:
    """What the tap calls a shallow signal of one block, counted from 0 in a tower of
    PUBLISHED_DEPTH.
    """
    return f"{name}@{layer}"


def shallow_keys(method: Any) -> frozenset[str]:
    """The shallow signals of a method, or of what is known of one."""
    return frozenset(
        shallow_key(name, method.shallow_layer) for name in SHALLOW if name in method.needs
    )


def tapped(names: Collection[str]) -> frozenset[str]:
    """Of the inputs that methods need, those that the tap forms while the tower runs."""
    formed = {
        name
        for name in names
        if name in ("saliency", "received", "attention", "keys") or "@" in name
    }
    return frozenset(
        formed | ({"last_query", "last_key"} if {"last_query", "last_key"} & set(names) else set())
    )


class AttentionTap:
    """Forms signals from the queries and keys of attention layers; a layer nobody asks about runs
    untouched.

    Everything is summed over the local heads and reduced over the tensor-parallel group, so that
    all ranks hold the same values. `layers` are the tower's computed attention ops in order,
    `depth` its full number of blocks, and `shallow` the `shallow_key`s that can be asked for.
    """

    def __init__(
        self, layers: Sequence[torch.nn.Module], depth: int, shallow: Collection[str]
    ) -> None:
        self.wanted: frozenset[str] = frozenset()
        # One row of queries each: so cheap that whoever keeps signals can have them formed for all
        # images.
        self.cheap = frozenset(
            {"saliency", *(key for key in shallow if key.startswith("shallow_saliency@"))}
        )
        self.signals: dict[str, torch.Tensor] = {}
        layers[-1].register_forward_pre_hook(self._read_last, with_kwargs=True)
        for signal in sorted(shallow):
            layer = int(signal.partition("@")[2])
            place = min(len(layers) - 1, round(layer * depth / PUBLISHED_DEPTH))
            layers[place].register_forward_pre_hook(self._reader(signal), with_kwargs=True)

    def take(self) -> dict[str, torch.Tensor]:
        """The signals of the last run, once."""
        signals, self.signals = self.signals, {}
        return signals

    def _reader(self, name: str) -> Any:
        form = _received if name.startswith("shallow_received@") else cls_attention

        def read(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in self.wanted:
                query, key = _query_key(args, kwargs)
                self.signals[name] = _over_heads(
                    layer, form(query, key, layer.num_heads, layer.scale)
                )

        return read

    def _read_last(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        wanted, heads, scale = self.wanted, layer.num_heads, layer.scale
        if not wanted:
            return
        query, key = _query_key(args, kwargs)
        if "saliency" in wanted:
            self.signals["saliency"] = _over_heads(layer, cls_attention(query, key, heads, scale))
        if "received" in wanted:
            self.signals["received"] = _over_heads(layer, _received(query, key, heads, scale))
        if "attention" in wanted:
            self.signals["attention"] = _over_heads(layer, attention_map(query, key, heads, scale))
        if "keys" in wanted:
            self.signals["keys"] = _over_heads(
                layer, key[:, 1:].float().unflatten(2, (heads, -1)).sum(2)
            )
        if {"last_query", "last_key"} & wanted:
            self.signals["last_query"] = _all_heads(query[:, 0])
            self.signals["last_key"] = _all_heads(key)


def _received(query: torch.Tensor, key: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    return received_attention(query, key, heads, scale, prefix=1, prefix_gives=True)


def _query_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    query, key = (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))[:2]
    return query, key


def _over_heads(layer: Any, summed: torch.Tensor) -> torch.Tensor:
    ranks = tensor_parallel_size()
    return (tensor_parallel_sum(summed) if ranks > 1 else summed) / (layer.num_heads * ranks)


def _all_heads(value: torch.Tensor) -> torch.Tensor:
    return tensor_parallel_gather(value) if tensor_parallel_size() > 1 else value


class Clock:
    """Seconds spent in named parts: wall time on the CPU, CUDA events read when asked (never in the
    hot path).
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    def start(self, device: torch.device) -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, part: str, started: Any) -> None:
        if isinstance(started, float):
            self._seconds[part] += time.perf_counter() - started
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append((part, started, event))
        if len(self._events) > 1000 and self._events[0][2].query():
            self._settle(self._events.pop(0))

    def _settle(self, entry: tuple[str, Any, Any]) -> None:
        part, first, last = entry
        self._seconds[part] += first.elapsed_time(last) / 1000

    def read(self) -> dict[str, float]:
        """Seconds by part so far; waits for the device."""
        while self._events:
            self._events[0][2].synchronize()
            self._settle(self._events.pop(0))
        return dict(self._seconds)
