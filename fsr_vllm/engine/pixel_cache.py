"""A byte-bounded cache of preprocessed images in a front end, keyed by the image alone."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any


class PixelCache:
    """Preprocessed images by key, at most `capacity` bytes; several threads may use it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()
        self._bytes = self._hits = self._misses = 0

    def get(self, key: bytes) -> Any | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: bytes, value: Any, size: int) -> None:
        with self._lock:
            if size > self.capacity:
                return
            if key in self._entries:
                self._bytes -= self._entries.pop(key)[1]
            while self._bytes + size > self.capacity:
                self._bytes -= self._entries.popitem(last=False)[1][1]
            self._entries[key] = (value, size)
            self._bytes += size

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def stats(self) -> dict[str, int]:
        with self._lock:
            return {
                "pixel_hits": self._hits,
                "pixel_misses": self._misses,
                "pixel_entries": len(self._entries),
                "pixel_bytes": self._bytes,
            }
