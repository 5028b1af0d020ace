"""The same questions through a running server: its answers must be those of the Python API."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.client import connect

from .bench import Bench
from .photos import data_url
from .scenes import render

METHODS = ("fsr", "cdpruner", "fastervlm")
BUDGETS = (16, 32)
_AT_ONCE = 16


def agreement(
    bench: Bench,
    folder: Path,
    methods: tuple[str, ...] = METHODS,
    budgets: tuple[int, ...] = BUDGETS,
    *,
    server_options: Sequence[str] = (),
    log: Path | None = None,
) -> dict[str, Any]:
    """Ask all questions of the bench over HTTP for every method and budget, and count answers that
    differ.

    Methods run with their published defaults on both sides; the API computes in float32 on the CPU,
    the server with `server_options` behind the demo's. `log` keeps the server's log.
    """
    from fsr_vllm.demo import SERVE_OPTIONS, serve

    with tempfile.TemporaryDirectory(prefix="fsr-agreement-") as place:
        options = [*SERVE_OPTIONS, "--max-num-seqs", str(_AT_ONCE), *server_options]
        with serve(str(folder), log or Path(place) / "server.log", options) as url:
            results = []
            for method in methods:
                for budget in budgets:
                    expected = bench.method(method, budget).words
                    answers = asyncio.run(_ask_all(bench, url, method, budget))
                    results.append(_compare(bench, method, budget, expected, answers))
    return {
        "questions": len(bench.items),
        "asked": len(bench.items) * len(results),
        "different": sum(result["different"] for result in results),
        "longer_than_a_word": sum(result["longer_than_a_word"] for result in results),
        "runs": results,
    }


def _compare(
    bench: Bench, method: str, budget: int, expected: list[str], answers: list[str]
) -> dict[str, Any]:
    pairs = list(zip(expected, (answer.split() for answer in answers), strict=True))
    different = [
        {
            "question": bench.items[row][1].text,
            "scene": bench.items[row][0],
            "api": word,
            "server": " ".join(said),
        }
        for row, (word, said) in enumerate(pairs)
        if not said or said[0] != word
    ]
    longer = sum(len(said) > 1 for _, said in pairs)
    return {
        "method": method, "budget": budget, "different": len(different), "longer_than_a_word":
        longer, "examples": different[:5],
    }  # fmt: skip


async def _ask_all(bench: Bench, url: str, method: str, budget: int) -> list[str]:
    client = connect(url)
    model = (await client.models.list()).data[0].id
    urls = dict.fromkeys(sorted({index for index, _ in bench.items}), "")
    for index in urls:
        urls[index] = data_url(Image.fromarray(render(bench.pictures.scenes[index])), "PNG")
    limit = asyncio.Semaphore(_AT_ONCE)

    async def ask(row: int) -> str:
        index, question = bench.items[row]
        async with limit:
            response = await client.chat.completions.create(
                model=model,
                messages=[
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": urls[index]}},
                            {"type": "text", "text": question.text},
                        ],
                    }
                ],
                max_tokens=3,
                temperature=0,
                extra_body={
                    "fsr_budget": budget,
                    "fsr_method": method,
                    "fsr_options": {"preset": "paper"},
                },
            )
        return response.choices[0].message.content or ""

    async with client:
        return list(await asyncio.gather(*(ask(row) for row in range(len(bench.items)))))
