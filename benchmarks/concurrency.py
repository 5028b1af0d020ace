"""Throughput, time to first token and peak memory of a real server at several concurrencies,
vanilla against pruned.

    python -m benchmarks.concurrency            # four servers one after the other

Every request brings a picture that no request before it had, so no cache of images helps either
side. Vanilla is the same server without the plugin. The models are random 576-token LLaVAs of
benchmarks.testbed: around the tiny one times say what the plugin costs, for its language model
takes no time; the wide one's prefill takes longer than its vision tower, as that of large models
does. Writes concurrency-cpu.json and .md into --out.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.testbed import build_checkpoint
from fsr_vllm.demo import SERVE_OPTIONS, serve

from .client import at_once, connect, pictures, row
from .records import write_json
from .report import machine
from .servicetimes import MODEL

CONCURRENCIES = (1, 4, 16, 64)
BUDGET = 64
SIDES = {
    "vanilla": (SERVE_OPTIONS[2:], {}),
    f"budget {BUDGET}": (SERVE_OPTIONS, {"fsr_budget": BUDGET}),
}
MODELS: dict[str, dict[str, int]] = {"tiny": {}, "wide": MODEL}
TOKENS = 4  # of each answer: what is looked at comes before them
WORKER = "VLLM::Worker"
MIB = 1 << 20


def worker() -> psutil.Process:
    """The process that runs the model: the one child of ours that vLLM names so."""
    found = [
        child
        for child in psutil.Process().children(recursive=True)
        if WORKER in " ".join(child.cmdline())
    ]
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


async def measure(
    url: str, fields: dict[str, Any], fresh: Iterator[str], requests: int
) -> list[dict[str, Any]]:
    client = connect(url)
    await at_once(client, [next(fresh) for _ in range(3)], fields, 1, TOKENS)  # one-time work
    process, rows = worker(), []
    for concurrency in CONCURRENCIES:
        urls = [next(fresh) for _ in range(max(requests, concurrency))]
        reset_peak(process)
        before = resident(process, "VmRSS")
        found: dict[str, Any] = await row(client, urls, fields, concurrency, TOKENS)
        found["rss_before_mib"], found["rss_peak_mib"] = (
            before / MIB,
            resident(process, "VmHWM") / MIB,
        )
        rows.append(found)
        print({key: round(value, 1) for key, value in found.items()}, flush=True)
    await client.close()
    return rows


def markdown(run: dict[str, Any]) -> str:
    about = "\n".join(f"- {name}: {value}" for name, value in run["machine"].items())
    lines = [
        f"{model} | {side} | {row['concurrency']} | {row['requests']} | "
        f"{row['prompt_tokens']:.0f} | "
        f"{row['requests_per_second']:.1f} | {row['ttft_p50_ms']:.0f} | {row['ttft_p95_ms']:.0f} | "
        f"{row['rss_before_mib']:.0f} | {row['rss_peak_mib']:.0f}"
        for model, sides in run["results"].items()
        for concurrency in CONCURRENCIES
        for side, rows in sides.items()
        for row in rows
        if row["concurrency"] == concurrency
    ]
    head = "model | side | at once | requests | prompt tokens | requests/s | "
    head += "TTFT p50 ms | p95 ms | RSS before | peak MiB"
    table = "\n".join([f"| {head} |", "|---|---|" + "--:|" * 8, *(f"| {line} |" for line in lines)])
    return f"""\
# Concurrency on the real server, CPU

`{run["command"]}`, {run["seconds"]:.0f} s.

{about}

{run["note"]} Random LLaVA-1.5s (576 visual tokens; {MODELS}), distinct pictures, {TOKENS} tokens per answer, the demo's
server options. RSS is the worker's: resident before each row's requests, and its peak (VmHWM, begun again for each row)
while they ran.

{table}
"""  # noqa: E501


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--requests",
        type=int,
        default=32,
        help="per concurrency, at least as many as it (default 32)",
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--note", default="", help="what else the machine was doing, for the report"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    run: dict[str, Any] = {
        "command": "python -m benchmarks.concurrency "
        + " ".join(sys.argv[1:] if argv is None else argv),
        "machine": machine("cpu"),
        "note": args.note,
        "results": {},
    }
    started, fresh = time.monotonic(), pictures()
    with tempfile.TemporaryDirectory(prefix="fsr-concurrency-") as folder:
        for name in args.models:
            model = build_checkpoint(Path(folder) / name, **MODELS[name])
            sides = run["results"][name] = {}
            for side, (options, fields) in SIDES.items():
                with serve(str(model), Path(folder) / "server.log", options) as url:
                    sides[side] = asyncio.run(measure(url, fields, fresh, args.requests))
    run["seconds"] = round(time.monotonic() - started, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "concurrency-cpu.json", run)
    (args.out / "concurrency-cpu.md").write_text(markdown(run), encoding="utf-8")
    print(markdown(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
