"""What benchmarks of a running server share: new pictures, streamed requests, and the figures of
many of them.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from PIL import Image

from benchmarks.testbed import data_url, photos
from fsr_vllm.demo import MODEL_NAME


def pictures() -> Iterator[str]:
    """Endless different photographs as data URLs: noise on top makes every one new."""
    originals = [np.asarray(image.resize((336, 336))) for image in photos().values()]
    for number in itertools.count():
        noise = np.random.default_rng(number).integers(-8, 9, originals[0].shape)
        pixels = (originals[number % len(originals)] + noise).clip(0, 255).astype(np.uint8)
        yield data_url(Image.fromarray(pixels), "JPEG")


def connect(url: str) -> AsyncOpenAI:
    """A client of a server on this machine, which fails rather than try again."""
    http = DefaultAsyncHttpxClient(trust_env=False)
    return AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=200, http_client=http)


async def one(
    client: AsyncOpenAI, url: str, fields: dict[str, Any], tokens: int
) -> dict[str, float]:
    """Seconds to the first token and to the end, and the prompt's tokens, of one answer."""
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is this?"},
    ]
    started = time.perf_counter()
    stream: Any = await client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": content}],  # type: ignore[misc, list-item]
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={**fields, "ignore_eos": True},
    )
    first, prompt = None, 0
    async for chunk in stream:
        # The chunk that only says who speaks is not a token; a token may have no text, being half a
        # character.
        if first is None and chunk.choices and chunk.choices[0].delta.role is None:
            first = time.perf_counter() - started
        prompt = chunk.usage.prompt_tokens if chunk.usage else prompt
    end = time.perf_counter() - started
    return {"first": end if first is None else first, "end": end, "prompt": prompt}


async def at_once(
    client: AsyncOpenAI, urls: Sequence[str], fields: dict[str, Any], concurrency: int, tokens: int
) -> list[dict[str, float]]:
    """All of `urls`, with as many on their way as `concurrency` says, always."""
    waiting = iter(urls)

    async def ask() -> list[dict[str, float]]:
        return [await one(client, url, fields, tokens) for url in waiting]

    return [
        answer
        for answers in await asyncio.gather(*(ask() for _ in range(concurrency)))
        for answer in answers
    ]


async def row(
    client: AsyncOpenAI, urls: Sequence[str], fields: dict[str, Any], concurrency: int, tokens: int
) -> dict[str, float]:
    """Ask all and sum up: throughput, times to the first token, tokens of the prompts."""
    started = time.perf_counter()
    answers = await at_once(client, urls, fields, concurrency, tokens)
    seconds = time.perf_counter() - started
    first = [answer["first"] for answer in answers]
    return {
        "concurrency": concurrency,
        "requests": len(urls),
        "prompt_tokens": statistics.mean(answer["prompt"] for answer in answers),
        "seconds": seconds,
        "requests_per_second": len(urls) / seconds,
        "ttft_p50_ms": 1000 * statistics.median(first),
        "ttft_p95_ms": 1000 * float(np.percentile(first, 95)),
        "whole_p50_ms": 1000 * statistics.median(answer["end"] for answer in answers),
    }
