"""Preprocessed images in a front end, by image alone: a new budget, method or question on a known
image does not need the image processor.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from cachetools import LRUCache


class PixelCache:
    """Preprocessed images by key, at most `capacity` bytes; several threads may use it."""

    def __init__(self, capacity: int) -> None:
        self._lock = threading.Lock()
        # Entries are (image, bytes).
        self._entries: LRUCache[bytes, tuple[Any, int]] = LRUCache(
            capacity, getsizeof=lambda entry: entry[1]
        )
        self._hits = self._misses = 0

    def get(self, key: bytes) -> Any | None:
        """An image, or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._misses += 1
                return None
            self._hits += 1
            return entry[0]

    def put(self, key: bytes, value: Any, size: int) -> None:
        """Keep an image of `size` bytes, instead of what was used longest ago; one that is larger
        than the cache stays out.
        """
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
                "pixel_bytes": self._entries.currsize,
            }
