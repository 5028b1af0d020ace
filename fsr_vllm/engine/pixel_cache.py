"""Preprocessed images in a front end, by image alone: a new budget, method or question on a known
image does not need the image processor.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from cachetools import LRUCache

from fsr_vllm.compat.types import KwargsItem


class PixelCache:
    """Preprocessed images by key; several threads may use it."""

    def __init__(self, capacity: int) -> None:
        """The cache holds at most `capacity` bytes."""
        self._lock = threading.Lock()
        # Entries are (image, bytes).
        self._entries: LRUCache[bytes, tuple[KwargsItem, int]] = LRUCache(
            capacity, getsizeof=lambda entry: entry[1]
        )
        self._hits = self._misses = 0

    def get(self, key: bytes) -> KwargsItem | None:
        """An image, or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._misses += 1
                return None
            self._hits += 1
            return entry[0]

    def look_up(self, keys: Sequence[bytes]) -> tuple[dict[bytes, KwargsItem], list[int]]:
        """What is held of a prompt's images, and the places of those to preprocess: of an image
        that stands there twice, the first.
        """
        found: dict[bytes, KwargsItem] = {}
        missing: dict[bytes, int] = {}
        for place, key in enumerate(keys):
            if key in found or key in missing:
                continue
            if (item := self.get(key)) is None:
                missing[key] = place
            else:
                found[key] = item
        return found, list(missing.values())

    def put(self, key: bytes, value: KwargsItem, size: int) -> None:
        """Keep an image of `size` bytes if it fits at all; what was used longest ago goes."""
        with self._lock:
            if size > self._entries.maxsize:
                return
            self._entries.pop(key, None)  # or its own bytes would count while room is made
            self._entries[key] = (value, size)

    def clear(self) -> None:
        """Forget all images."""
        with self._lock:
            self._entries.clear()

    def stats(self) -> dict[str, int]:
        """Hits and misses since the start, and what is held now."""
        with self._lock:
            return {
                "pixel_hits": self._hits,
                "pixel_misses": self._misses,
                "pixel_entries": len(self._entries),
                "pixel_bytes": int(self._entries.currsize),
            }
