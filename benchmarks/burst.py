"""What one client's prompt of many small budgets costs the others: the gaps in the answer of a text
request beside it.

    python -m benchmarks.burst            # about five minutes on two cores

Serves the bundled model three ways: without the plugin, with it, and with `--fsr-encoder-limit
kept`. While a text request streams its answer, another client sends the fullest prompt it can:
without the plugin as many images as the context takes unpruned, with it --images different pictures
of 8 x 8 pixels at a budget of 1. The longest wait between two tokens of the text request is the
cost; the first measurement without any neighbour is the floor (A/A). Writes encoder-burst-cpu.json
and .md into --out.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import statistics
import sys
import tempfile
import time
from base64 import b64encode
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from fsr_vllm.demo import ENVIRONMENT, MODEL_NAME, SERVE_OPTIONS, demo_model, serve

from .records import write_json
from .report import machine

TOTAL, LENGTH = 144, 4096  # visual tokens of an image; tokens of the longest prompt with its answer
OPTIONS = (
    *SERVE_OPTIONS, "--max-model-len", str(LENGTH), "--max-num-batched-tokens", "2048",
    "--limit-mm-per-prompt", '{"image": 1000}',
)  # fmt: skip
SERVERS = {
    "without the plugin": OPTIONS[2:],
    "with it": OPTIONS,
    "with it, limit on kept tokens": (*OPTIONS, "--fsr-encoder-limit", "kept"),
}
# The engine on one core: on all of them it would keep the API server from sending what it has.
PINNED = {**ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0)))}
ANSWER = 1500  # tokens of the text request, enough to outlast its neighbour


def picture(number: int) -> str:
    """A picture nobody sent before: 8 x 8 pixels of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256 % 256, number // 65536)).save(
        buffer, "PNG"
    )
    return "data:image/png;base64," + b64encode(buffer.getvalue()).decode()


async def gaps(
    client: httpx.AsyncClient, started: asyncio.Event, done: asyncio.Event
) -> list[float]:
    """Seconds between tokens of one text request while its neighbour, which starts after the first
    ones, is there.
    """
    body = {
        "model": MODEL_NAME,
        "max_tokens": ANSWER,
        "stream": True,
        "ignore_eos": True,
        "temperature": 0,
    }
    body["messages"] = [{"role": "user", "content": f"Count. {time.perf_counter()}"}]
    found, last, tokens = [], None, 0
    async with client.stream("POST", "/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.perf_counter()
            if last is not None and started.is_set():
                found.append(now - last)
            last, tokens = now, tokens + 1
            if tokens == 20:
                started.set()
            if done.is_set() and len(found) > 50:
                break
    return found


async def neighbour(
    client: httpx.AsyncClient,
    images: list[str],
    fields: dict[str, Any],
    started: asyncio.Event,
    done: asyncio.Event,
) -> float | None:
    """The prompt with many images; seconds until it is answered, None without images."""
    await started.wait()
    begun = time.perf_counter()
    if images:
        content = [{"type": "image_url", "image_url": {"url": url}} for url in images]
        body = {
            "model": MODEL_NAME,
            "max_tokens": 1,
            "messages": [{"role": "user", "content": content}],
            **fields,
        }
        (await client.post("/chat/completions", json=body)).raise_for_status()
    else:
        await asyncio.sleep(2)
    done.set()
    return time.perf_counter() - begun if images else None


async def once(url: str, images: list[str], fields: dict[str, Any]) -> dict[str, Any]:
    started, done = asyncio.Event(), asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        waits, answered = await asyncio.gather(
            gaps(client, started, done), neighbour(client, images, fields, started, done)
        )
    return {"longest": max(waits), "median": statistics.median(waits), "neighbour": answered}


def run(args: argparse.Namespace) -> dict[str, Any]:
    numbers = iter(range(1 << 24))
    data: dict[str, Any] = {
        "machine": machine("cpu"),
        "images": args.images,
        "laps": args.laps,
        "servers": {},
    }
    for name, options in SERVERS.items():
        pruned = name != "without the plugin"
        count = args.images if pruned else (LENGTH - 64) // (TOTAL + 1)
        fields = {"fsr_budget": 1} if pruned else {}
        with (
            tempfile.TemporaryDirectory(prefix="fsr-burst-") as folder,
            serve(str(demo_model()), Path(folder) / "log", options, PINNED) as url,
        ):
            # The first request pays for one-time work.
            asyncio.run(once(url, [picture(next(numbers))], fields))
            floor = [asyncio.run(once(url, [], fields)) for _ in range(args.laps)]
            beside = [
                asyncio.run(once(url, [picture(next(numbers)) for _ in range(count)], fields))
                for _ in range(args.laps)
            ]
        data["servers"][name] = {"images": count, "alone": floor, "beside": beside}
        print(name, json.dumps(data["servers"][name]), flush=True)
    return data


def markdown(data: dict[str, Any]) -> str:
    """The table; seconds, medians over the laps with their range."""
    about = ", ".join(f"{name} {value}" for name, value in data["machine"].items())
    lines = [
        "# A text request beside one prompt of many images",
        "",
        f"`python -m benchmarks.burst --images {data['images']} --laps {data['laps']}`; {about}.",
        f"Bundled model, {TOTAL} visual tokens per image, steps of 2,048 tokens; the engine on "
        "one core. Longest",
        "seconds between two tokens of a running text request, median over the laps (all of them "
        "in brackets). Single",
        "laps have stalls of seconds without any neighbour too, whose cause was not found: "
        "compare medians.",
        "",
        "| server | images of the prompt | alone | beside it | that prompt is answered after |",
        "|---|---|---|---|---|",
    ]
    for name, found in data["servers"].items():
        cells = [
            [each[key] for each in found[part]]
            for part, key in (("alone", "longest"), ("beside", "longest"))
        ]
        cells.append([each["neighbour"] for each in found["beside"]])
        shown = [
            f"{statistics.median(cell):.2f} ({', '.join(f'{x:.2f}' for x in sorted(cell))})"
            for cell in cells
        ]
        lines.append(f"| {name} | {found['images']} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=900)
    parser.add_argument("--laps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    data = run(args)
    write_json(args.out / "encoder-burst-cpu.json", data)
    (args.out / "encoder-burst-cpu.md").write_text(markdown(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
