"""Throughput, time to first token and peak memory of a real server at several concurrencies, vanilla against pruned.

    python -m benchmarks.concurrency            # two servers one after the other, under 4 minutes on 2 cores

Every request brings a picture that no request before it had, so no cache of images helps either side. Vanilla is the
same server without the plugin. The model is the random 576-token LLaVA of fsr_vllm.testbed: times say what the plugin
costs and spares around a tiny model, not what a large one gains. Writes concurrency-cpu.json and .md into --out.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from PIL import Image

from fsr_vllm.demo import MODEL_NAME, SERVE_OPTIONS, serve
from fsr_vllm.testbed import build_checkpoint, data_url, photos

from .report import machine

CONCURRENCIES = (1, 4, 16, 64)
BUDGET = 64
SIDES = {"vanilla": (SERVE_OPTIONS[2:], {}), f"budget {BUDGET}": (SERVE_OPTIONS, {"fsr_budget": BUDGET})}
TOKENS = 4  # of each answer: what is looked at comes before them
WORKER = "VLLM::Worker"
MIB = 1 << 20


def pictures() -> Iterator[str]:
    """Endless different photographs as data URLs: noise on top makes every one new."""
    originals = [np.asarray(image.resize((336, 336))) for image in photos().values()]
    for number in itertools.count():
        noise = np.random.default_rng(number).integers(-8, 9, originals[0].shape)
        pixels = (originals[number % len(originals)] + noise).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        yield data_url(Image.open(buffer))


def worker() -> psutil.Process:
    """The process that runs the model: the one child of ours that vLLM names so."""
    found = [child for child in psutil.Process().children(recursive=True) if WORKER in " ".join(child.cmdline())]
    if len(found) != 1:
        raise RuntimeError(f"expected one process {WORKER}; found {len(found)}")
    return found[0]


def reset_peak(process: psutil.Process) -> None:
    """Let VmHWM begin again from what is resident now (Linux: 5 into clear_refs)."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def resident(process: psutil.Process, field: str) -> int:
    """VmRSS or VmHWM in bytes."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


async def one(client: AsyncOpenAI, url: str, fields: dict[str, Any]) -> dict[str, float]:
    """Seconds to the first token and to the end, and the prompt's tokens, of one streamed answer."""
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is this?"},
    ]
    started = time.perf_counter()
    stream: Any = await client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": content}],  # type: ignore[misc, list-item]
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={**fields, "ignore_eos": True},
    )
    first, prompt = None, 0
    async for chunk in stream:
        if chunk.choices and first is None and chunk.choices[0].delta.content:
            first = time.perf_counter() - started
        prompt = chunk.usage.prompt_tokens if chunk.usage else prompt
    end = time.perf_counter() - started
    return {"first": end if first is None else first, "end": end, "prompt": prompt}


async def at_once(client: AsyncOpenAI, urls: list[str], fields: dict[str, Any], concurrency: int) -> list[Any]:
    """All of `urls`, with as many on their way as `concurrency` says, always."""
    waiting = iter(urls)

    async def ask() -> list[Any]:
        return [await one(client, url, fields) for url in waiting]

    return [answer for answers in await asyncio.gather(*(ask() for _ in range(concurrency))) for answer in answers]


async def measure(url: str, fields: dict[str, Any], fresh: Iterator[str], requests: int) -> list[dict[str, Any]]:
    http = DefaultAsyncHttpxClient(trust_env=False)
    client = AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=200, http_client=http)
    await at_once(client, [next(fresh) for _ in range(3)], fields, 1)  # one-time work
    process, rows = worker(), []
    for concurrency in CONCURRENCIES:
        urls = [next(fresh) for _ in range(max(requests, concurrency))]
        reset_peak(process)
        before, started = resident(process, "VmRSS"), time.perf_counter()
        answers = await at_once(client, urls, fields, concurrency)
        seconds = time.perf_counter() - started
        first = [answer["first"] for answer in answers]
        rows.append(
            {
                "concurrency": concurrency,
                "requests": len(urls),
                "prompt_tokens": statistics.mean(answer["prompt"] for answer in answers),
                "seconds": seconds,
                "requests_per_second": len(urls) / seconds,
                "ttft_p50_ms": 1000 * statistics.median(first),
                "ttft_p95_ms": 1000 * float(np.percentile(first, 95)),
                "rss_before_mib": before / MIB,
                "rss_peak_mib": resident(process, "VmHWM") / MIB,
            }
        )
        print({key: round(value, 1) for key, value in rows[-1].items()}, flush=True)
    await client.close()
    return rows


def markdown(run: dict[str, Any]) -> str:
    about = "\n".join(f"- {name}: {value}" for name, value in run["machine"].items())
    lines = [
        f"{side} | {row['concurrency']} | {row['requests']} | {row['prompt_tokens']:.0f} | "
        f"{row['requests_per_second']:.1f} | {row['ttft_p50_ms']:.0f} | {row['ttft_p95_ms']:.0f} | "
        f"{row['rss_before_mib']:.0f} | {row['rss_peak_mib']:.0f}"
        for concurrency in CONCURRENCIES
        for side in SIDES
        for row in run["results"][side]
        if row["concurrency"] == concurrency
    ]
    head = (
        "| side | concurrency | requests | prompt tokens | requests/s | TTFT p50 ms | p95 ms | RSS before | peak MiB |"
    )
    table = "\n".join([head, "|---|" + "--:|" * 8, *(f"| {line} |" for line in lines)])
    return f"""\
# Concurrency on the real server, CPU

`{run["command"]}`, {run["seconds"]:.0f} s.

{about}

{run["note"]} Tiny random LLaVA-1.5 (576 visual tokens), distinct pictures, {TOKENS} tokens per answer. RSS is the
worker's: resident before each row's requests, and its peak (VmHWM, begun again for each row) while they ran.

{table}
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=32, help="per concurrency, at least as many as it (default 32)")
    parser.add_argument("--note", default="", help="what else the machine was doing, for the report")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    run: dict[str, Any] = {
        "command": "python -m benchmarks.concurrency " + " ".join(sys.argv[1:] if argv is None else argv),
        "machine": machine("cpu"),
        "note": args.note,
        "results": {},
    }
    started, fresh = time.monotonic(), pictures()
    with tempfile.TemporaryDirectory(prefix="fsr-concurrency-") as folder:
        model = build_checkpoint(Path(folder) / "model")
        for side, (options, fields) in SIDES.items():
            with serve(str(model), Path(folder) / "server.log", options) as url:
                run["results"][side] = asyncio.run(measure(url, fields, fresh, args.requests))
    run["seconds"] = round(time.monotonic() - started, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "concurrency-cpu.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    (args.out / "concurrency-cpu.md").write_text(markdown(run), encoding="utf-8")
    print(markdown(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
