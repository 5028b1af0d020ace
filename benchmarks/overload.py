"""A real server under three times the load it can take, with a fixed and with an adaptive default
budget.

    python -m benchmarks.overload            # about five minutes on one core

Serves the generated LLaVA (random weights, a language model wide enough that prefill matters)
twice: `--fsr-budget HIGH` and `--fsr-adaptive LOW:HIGH`. The first server's rate with requests
always waiting is the capacity; both then get the same Poisson arrivals, each request with a picture
of its own and no budget. Answers are read for at most --drain seconds after the last arrival; what
had no first token by then counts with the time it had waited. Writes overload-cpu.json and .md into
--out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from benchmarks.testbed.checkpoint import build_checkpoint
from benchmarks.testbed.photos import data_url
from fsr_vllm.demo import MODEL_NAME, SERVE_OPTIONS, serve

from .queueing import poisson
from .records import write_json
from .report import machine
from .servicetimes import MODEL, QUESTION, pictures

TOKENS = 16
# The simulation's limits.
OPTIONS = (
    *SERVE_OPTIONS, "--kv-cache-memory-bytes", "805306368", "--max-num-seqs", "64",
    "--max-num-batched-tokens", "2048",
)  # fmt: skip
BOUNDS = (5.0, 15.0, 30.0)  # seconds to the first token; each is reported
# as in the simulation: a good first token takes at most so many times what it takes at rest
PATIENCE = 8.0


async def ask(
    client: httpx.AsyncClient, picture: str, number: int, **fields: Any
) -> dict[str, Any]:
    """One streamed request: seconds to the first token and the end, and the kept/total header."""
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": f"{number} {QUESTION}"},
    ]
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": TOKENS,
    }
    body |= {"temperature": 0, "stream": True, "ignore_eos": True, **fields}
    started, first = time.perf_counter(), None
    found: dict[str, Any] = {
        "started": started,
        "status": None,
        "first": None,
        "done": None,
        "tokens": None,
    }
    try:
        async with client.stream("POST", "/chat/completions", json=body) as answer:
            found |= {
                "status": answer.status_code,
                "tokens": answer.headers.get("x-fsr-visual-tokens"),
            }
            async for line in answer.aiter_lines():
                if first is None and '"content"' in line and '"role"' not in line:
                    first = found["first"] = time.perf_counter() - started
        found["done"] = time.perf_counter() - started
    except (asyncio.CancelledError, httpx.HTTPError):
        pass  # counted as unanswered
    return found


async def load(
    url: str, urls: list[str], arrivals: list[float], drain: float
) -> list[dict[str, Any]]:
    """All arrivals at their times; what is not done `drain` seconds after the last is given up."""
    timeout = httpx.Timeout(None)
    async with httpx.AsyncClient(
        base_url=url, timeout=timeout, trust_env=False, limits=httpx.Limits(max_connections=None)
    ) as client:
        started, tasks = time.perf_counter(), []
        for number, (arrival, picture) in enumerate(zip(arrivals, urls, strict=True)):
            await asyncio.sleep(max(0.0, started + arrival - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(client, picture, number)))
        _, pending = await asyncio.wait(tasks, timeout=drain)
        for task in pending:
            task.cancel()
        results = await asyncio.gather(*tasks)
        ended = time.perf_counter()
    for result in results:
        result["waited"] = (
            result["first"] if result["first"] is not None else ended - result["started"]
        )
    return list(results)


async def rested(url: str, urls: list[str], high: int) -> float:
    """Median seconds to the first token with nothing else to do, after warming up."""
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
        found = [
            await ask(client, picture, number, fsr_budget=high)
            for number, picture in enumerate(urls)
        ]
    return sorted(result["first"] for result in found[1:])[len(found[1:]) // 2]


def summary(results: list[dict[str, Any]], seconds: float, limit: float) -> dict[str, Any]:
    """Figures of one run."""
    waits = sorted(result["waited"] for result in results)
    return {
        "requests": len(results),
        "first_tokens": sum(result["first"] is not None for result in results),
        "done": sum(result["done"] is not None for result in results),
        "errors": sum(result["status"] not in (None, 200) for result in results),
        "ttft_p50": round(waits[len(waits) // 2], 2),
        "ttft_p95": round(waits[int(0.95 * (len(waits) - 1))], 2),
        "goodput": round(
            sum(r["first"] is not None and r["first"] <= limit for r in results) / seconds, 3
        ),
        "within": {
            f"{bound:g}": sum(r["first"] is not None and r["first"] <= bound for r in results)
            for bound in BOUNDS
        },
        "waits": [round(wait, 2) for wait in waits],
        "budgets": dict(Counter(str(result["tokens"]) for result in results)),
    }


def metrics(url: str) -> dict[str, float]:
    """The plugin's own lines of /metrics."""
    lines = httpx.get(
        url.removesuffix("/v1") + "/metrics", timeout=60, trust_env=False
    ).text.splitlines()
    found = (
        line.rpartition(" ")
        for line in lines
        if line.startswith("fsr_adaptive") and "_created" not in line
    )
    return {name: float(value) for name, _, value in found}


def run(args: argparse.Namespace, data: dict[str, Any]) -> None:
    """Both servers, one after the other; `data` gets their figures and is written after each."""
    stock = (data_url(picture) for picture in pictures(4000))
    with tempfile.TemporaryDirectory(prefix="fsr-overload-") as folder:
        model = str(build_checkpoint(Path(folder) / "model", **MODEL))
        policies = {
            f"fixed {args.high}": ("--fsr-budget", str(args.high)),
            f"adaptive {args.low}:{args.high}": ("--fsr-adaptive", f"{args.low}:{args.high}"),
        }
        # In turns, back and forth: on a shared machine no policy has the better half of the time.
        turns = [
            turn
            for lap in range(args.laps)
            for turn in list(policies.items())[:: -1 if lap % 2 else 1]
        ]
        for number, (policy, options) in enumerate(turns, 1):
            name = f"{number}. {policy}"
            with serve(model, Path(folder) / "log", (*OPTIONS, *options)) as url:
                take = lambda count: [next(stock) for _ in range(count)]  # noqa: E731
                rest = asyncio.run(rested(url, take(5), args.high))
                if "rate" not in data:
                    began = time.perf_counter()
                    asyncio.run(load(url, take(args.probe), [0.0] * args.probe, 600.0))
                    data["capacity"] = args.probe / (time.perf_counter() - began)
                    data["rate"] = args.overload * data["capacity"]
                    data["ttft_at_rest"], data["ttft_limit"] = rest, PATIENCE * rest
                arrivals = poisson(((args.seconds, data["rate"]),), args.seed)
                results = asyncio.run(load(url, take(len(arrivals)), arrivals, args.drain))
                data["runs"][name] = summary(results, args.seconds, data["ttft_limit"]) | {
                    "metrics": metrics(url)
                }
                data["runs"][name]["ttft_at_rest"] = rest
                print(name, json.dumps(data["runs"][name]), flush=True)
                write(data, args.out)  # what was measured stays if a later run fails


def write(data: dict[str, Any], folder: Path) -> None:
    """Both files."""
    write_json(folder / "overload-cpu.json", data)
    (folder / "overload-cpu.md").write_text(markdown(data))


def markdown(data: dict[str, Any]) -> str:
    """The same as a table."""
    lines = [
        "# A real server under overload: CPU",
        "",
        f"`{data['command']}`",
        "",
        data["note"],
        "",
    ]
    lines += [f"- {key}: {value}" for key, value in data["machine"].items()]
    lines += [f"- model: {json.dumps(data['model'])}, random weights", ""]
    lines += [
        f"Capacity at {data['high']} tokens {data['capacity']:.2f} requests/s; offered "
        f"{data['rate']:.2f} requests/s. "
        f"First token at rest {data['ttft_at_rest']:.2f} s; good is within "
        f"{data['ttft_limit']:.2f} s.",
        "",
        "| run, default | at rest s | sent | first tokens | done | TTFT p50 s | p95 s | goodput "
        "/s | "
        f"first token within {', '.join(f'{bound:g}' for bound in BOUNDS)} s | kept/total: how "
        "many |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in data["runs"].items():
        budgets = ", ".join(f"{tokens}: {count}" for tokens, count in found["budgets"].items())
        lines.append(
            f"| {name} | {found['ttft_at_rest']:.2f} | {found['requests']} | "
            f"{found['first_tokens']} | "
            f"{found['done']} | {found['ttft_p50']:.2f} | {found['ttft_p95']:.2f} | "
            f"{found['goodput']:.2f} | "
            f"{', '.join(map(str, found['within'].values()))} | {budgets} |"
        )
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> int:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--low", type=int, default=64)
    parser.add_argument("--high", type=int, default=288)
    parser.add_argument("--overload", type=float, default=3.0, help="times the capacity")
    parser.add_argument("--seconds", type=float, default=45.0, help="of arrivals")
    parser.add_argument(
        "--drain", type=float, default=45.0, help="seconds to wait after the last arrival"
    )
    parser.add_argument("--probe", type=int, default=24, help="requests that measure the capacity")
    parser.add_argument("--laps", type=int, default=1, help="runs of each policy")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--note", default="", help="about the machine, for the report")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    given = [
        word
        for word in (sys.argv[1:] if argv is None else argv)
        if word not in ("--note", args.note)
    ]
    data: dict[str, Any] = {"command": " ".join(["python -m benchmarks.overload", *given])}
    data["note"] = (
        "A request without a first token at the end counts with the time it had waited. "
        f"{args.note}".strip()
    )
    data |= {
        "machine": machine("cpu"),
        "model": MODEL,
        "low": args.low,
        "high": args.high,
        "runs": {},
    }
    run(args, data)
    print(markdown(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
