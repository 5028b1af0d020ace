"""Requests for a server and what becomes of them: made beforehand, so that the client costs little.

The client reads the stream's lines without parsing any but the last one, and sends bodies that are
bytes already: at a hundred requests a second it must not compete with the servers for the cores.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from .servers import MODEL_NAME

_SIDE = 336
_WORDS = (
    "red", "green", "blue", "yellow", "orange", "black", "white", "grey", "brown", "left", "right",
    "above", "below", "near", "far", "big", "small", "one", "two", "three", "four", "five", "cat",
    "table", "cup", "sign", "chair", "sky", "rocket", "coin", "flag", "man", "grass", "garage",
)  # fmt: skip


class Pictures:
    """Endless different pictures as data URLs, made on demand and kept until they are sent."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._grain = self._rng.integers(-8, 9, (16, _SIDE, _SIDE, 3), dtype=np.int16)
        self._ready: deque[bytes] = deque()

    def __len__(self) -> int:
        return len(self._ready)

    def make(self, count: int) -> None:
        """Soft colours under a camera's grain: as hard to decode as a photograph of this size."""
        for _ in range(count):
            colours = self._rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            smooth = Image.fromarray(colours).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
            grain = self._grain[self._rng.integers(len(self._grain))]
            pixels = (np.asarray(smooth, dtype=np.int16) + grain).clip(0, 255).astype(np.uint8)
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, "JPEG", quality=90)
            self._ready.append(b"data:image/jpeg;base64," + base64.b64encode(out.getvalue()))

    def take(self, count: int) -> list[bytes]:
        self.make(max(0, count - len(self._ready)))
        return [self._ready.popleft() for _ in range(count)]


def questions(seed: int) -> Iterator[str]:
    """Endless different questions of six words each."""
    rng = np.random.default_rng(seed)
    for number in itertools.count():
        first = _WORDS[number % len(_WORDS)]
        words = [first, *(_WORDS[i] for i in rng.integers(len(_WORDS), size=5))]
        yield f"Is there {' '.join(words)}?"


def body(picture: bytes, question: str, tokens: int, fields: dict[str, Any]) -> bytes:
    """A streamed chat completion of exactly `tokens` tokens."""
    mark = "PICTURE"
    content = [
        {"type": "image_url", "image_url": {"url": mark}},
        {"type": "text", "text": question},
    ]
    request = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    return json.dumps(request | fields).encode().replace(mark.encode(), picture, 1)


@dataclass(frozen=True)
class Answer:
    """One answer: seconds to the first token and to the last one, and the counts of usage."""

    first: float
    last: float
    prompt: int
    tokens: int


async def ask(session: aiohttp.ClientSession, root: str, request: bytes) -> Answer:
    """Send one request and read its stream; RuntimeError for any answer that is not whole."""
    started, first, last, usage = time.perf_counter(), 0.0, 0.0, b""
    headers = {"content-type": "application/json"}
    url = f"{root}/v1/chat/completions"
    async with session.post(url, data=request, headers=headers) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {(await response.text())[:500]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            if b'"choices":[]' in line:
                usage = line[len(b"data: ") :]
            elif b'"role":' not in line:  # the chunk that only says who speaks is not a token
                last = time.perf_counter() - started
                first = first or last
    counts = json.loads(usage or b"{}").get("usage")
    if not counts or not first:
        raise RuntimeError("the stream ended early")
    return Answer(first, last, counts["prompt_tokens"], counts["completion_tokens"])


async def at_once(root: str, requests: Sequence[bytes], concurrency: int) -> list[Answer]:
    """All answers, with `concurrency` requests on their way at any time; errors come as a group."""
    waiting = iter(requests)
    limits = aiohttp.ClientTimeout(total=180)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=limits) as session:

        async def one_after_the_other() -> list[Answer]:
            return [await ask(session, root, request) for request in waiting]

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one_after_the_other()) for _ in range(concurrency)]
    return [answer for task in tasks for answer in task.result()]


def figures(answers: Sequence[Answer], seconds: float) -> dict[str, float]:
    """What a block of requests sums up to."""
    later = [(a.last - a.first) / (a.tokens - 1) for a in answers if a.tokens > 1]
    first = [1000 * a.first for a in answers]
    return {
        "requests": len(answers),
        "seconds": seconds,
        "prompt_tokens": statistics.median(a.prompt for a in answers),
        "requests_per_second": len(answers) / seconds,
        "ttft_ms": statistics.median(first),
        "ttft_p95_ms": float(np.percentile(first, 95)),
        "later_token_ms": 1000 * statistics.median(later) if later else float("nan"),
        "whole_ms": 1000 * statistics.median(a.last for a in answers),
    }
