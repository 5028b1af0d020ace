"""A byte-bounded cache of vision features in a worker, keyed by the image alone.

Budgets, methods and questions are not part of the key, so that a new one on a known image costs no
run of the vision tower. What was used longest ago is dropped.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

_ALIGNMENT = 256  # bytes; any dtype may start there, and copies run at full speed


@dataclass
class _Entry:
    start: int
    size: int
    tensors: dict[str, torch.Tensor]  # views of the cache's block


class FeatureCache:
    """What the vision tower gave for each image, in one block of `capacity` bytes allocated here
    and never grown.

    Made with the model, the block counts as memory of the model when vLLM sizes its KV cache. Which
    entries it holds follows from the sequence of calls alone, so that tensor-parallel ranks, which
    all see the same images in the same order and sizes, hit and miss together.
    """

    def __init__(self, capacity: int, device: torch.device | None = None) -> None:
        # Written to at once: a CPU worker counts the memory it has touched, not what it was
        # promised.
        self._block = torch.empty(capacity, dtype=torch.uint8, device=device).zero_()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._holes = [(0, capacity)]  # (start, size), ascending, never adjacent
        self.hits = 0  # also counts what needed no look-up: the same image twice in one batch
        self._misses = self._evictions = 0

    def get(self, key: bytes, names: Collection[str]) -> Mapping[str, torch.Tensor] | None:
        """The image's tensors if all of `names` are among them; valid until the next `put`."""
        entry = self._entries.get(key)
        if entry is None or not entry.tensors.keys() >= set(names):
            self._misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry.tensors

    def names(self, key: bytes | None) -> frozenset[str]:
        """What is held of an image."""
        entry = self._entries.get(key) if key else None
        return frozenset(entry.tensors) if entry else frozenset()

    def put(self, key: bytes, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy an image's tensors in, instead of older ones; what exceeds the block stays out."""
        if key in self._entries:
            self._free(self._entries.pop(key))
        places, size = {}, 0
        for name, value in tensors.items():
            places[name] = size
            size += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
        if size > self._block.numel():
            return
        while (start := self._take(size)) is None:
            self._free(self._entries.popitem(last=False)[1])
            self._evictions += 1
        entry = _Entry(start, size, {})
        for name, value in tensors.items():
            raw = self._block[start + places[name] :][: value.nbytes]
            entry.tensors[name] = raw.view(value.dtype).view(value.shape)
            entry.tensors[name].copy_(value)
        self._entries[key] = entry

    def clear(self) -> None:
        self._entries.clear()
        self._holes = [(0, self._block.numel())]

    def stats(self) -> dict[str, int]:
        return {
            "feature_hits": self.hits,
            "feature_misses": self._misses,
            "feature_evictions": self._evictions,
            "feature_entries": len(self._entries),
            "feature_bytes": sum(entry.size for entry in self._entries.values()),
            "feature_capacity_bytes": self._block.numel(),
        }

    def _take(self, size: int) -> int | None:
        for index, (start, free) in enumerate(self._holes):
            if free >= size:
                self._holes[index : index + 1] = (
                    [(start + size, free - size)] if free > size else []
                )
                return start
        return None

    def _free(self, entry: _Entry) -> None:
        start, size = entry.start, entry.size
        index = bisect.bisect(self._holes, (start, size))
        if index < len(self._holes) and self._holes[index][0] == start + size:
            size += self._holes.pop(index)[1]
        if index and sum(self._holes[index - 1]) == start:
            index -= 1
            before = self._holes.pop(index)
            start, size = before[0], before[1] + size
        self._holes.insert(index, (start, size))
