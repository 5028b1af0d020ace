"""A real server with the sizes of LLaVA-1.5-7B, without the plugin and with it at several budgets
and concurrencies.

    python -m benchmarks.serving                       # a GPU with 20 GiB or more; about five
    minutes python -m benchmarks.serving --size tiny --server-options '--dtype float32'      # the
    same path on a CPU

Weights are random (`--load-format dummy`): costs are the real model's, answers mean nothing. Every
request brings a picture of its own, so no cache of images helps. Servers, in this order: vanilla
(no plugin loaded), plugin (all budgets in one server), and plugin-max (`--fsr-max-budget` at the
smallest budget: what vLLM then has left for its KV cache; one concurrency). Each is written to
serving-gpu.json and .md (or -cpu) when it is done, so a later failure costs nothing;
--seconds-limit leaves out what no longer fits. --before and --after run a command around what is
timed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.testbed import build_checkpoint
from fsr_vllm.demo import ENVIRONMENT, MODEL_NAME, serve

from .client import at_once, connect, pictures, row
from .published import DTYPE, llava_7b
from .report import machine

SIDES = ("vanilla", "plugin", "plugin-max")
COMMON = (
    "--served-model-name",
    MODEL_NAME,
    "--max-model-len",
    "2048",
    "--limit-mm-per-prompt",
    '{"image": 1}',
)
SIZES = {"7b": (*COMMON, "--dtype", DTYPE, "--load-format", "dummy"), "tiny": COMMON}
# What a server says of its memory and of how it runs, by the name it gets in the report.
LOG = {
    "KV cache tokens": r"KV cache size: ([\d,]+) tokens",
    "KV cache memory": r"Available KV cache memory: ([\d.]+ \w+)",
    "concurrency": r"Maximum concurrency for (.+x)",
    "weights": r"Model loading took (.+?) and",
    "attention": r"[Uu]sing (\w+) attention backend",
    "vision attention": r"[Uu]sing (?:backend )?(\S+) for (?:vit|MMEncoder)",
    "plugin": r"fsr_vllm: (active .*)",
}


class Limit:
    """The seconds that are left of the whole run."""

    def __init__(self, seconds: float) -> None:
        self.started, self.seconds = time.monotonic(), seconds

    @property
    def used(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        return self.seconds - self.used


def gpu() -> dict[str, Any]:
    """Name, used and whole memory (MiB) of the first GPU; empty where there is none. Takes no
    memory on it itself.
    """
    command = [
        "nvidia-smi",
        "--query-gpu=name,memory.used,memory.total",
        "--format=csv,noheader,nounits",
    ]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.splitlines()[0]
        name, used, total = found.split(", ")
        return {"name": name, "used": int(used), "total": int(total)}
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return {}


def said(log: Path) -> dict[str, str]:
    """What the server's log says about LOG, the last time it says so."""
    text = log.read_text(errors="replace")
    found = {name: re.findall(pattern, text) for name, pattern in LOG.items()}
    return {name: values[-1] for name, values in found.items() if values}


def counts(url: str) -> dict[str, float]:
    """The worker's statistics of the plugin; empty where there is none."""
    answer = httpx.get(f"{url}/fsr/stats", timeout=60, trust_env=False)
    workers = answer.json().get("workers") if answer.status_code == 200 else None
    return dict(workers[0]) if workers else {}


def embedding(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Milliseconds per image in the tower (projector included) and in selection, between two
    readings.
    """
    images = after.get("images", 0) - before.get("images", 0)
    if not images:
        return {}
    parts = {
        part: after.get(f"seconds_{part}", 0) - before.get(f"seconds_{part}", 0)
        for part in ("tower", "select")
    }
    found = {f"{part}_ms_per_image": 1000 * seconds / images for part, seconds in parts.items()}
    return found | {"select_share": parts["select"] / max(1e-9, sum(parts.values()))}


async def measure(
    url: str, budgets: list[Any], args: argparse.Namespace, fresh: Iterator[str], limit: Limit
) -> Any:
    """Rows of one server, by concurrency and budget; yields each when it is there."""
    client = connect(url)
    fields: dict[Any, dict[str, Any]] = {b: {} if b is None else {"fsr_budget": b} for b in budgets}
    for budget in budgets:  # one-time work: compilers, alone and in a batch
        await at_once(client, [next(fresh) for _ in range(2)], fields[budget], 1, args.tokens)
        many = min(16, max(args.concurrency))
        await at_once(
            client, [next(fresh) for _ in range(2 * many)], fields[budget], many, args.tokens
        )
    for concurrency in args.concurrency:
        urls = [next(fresh) for _ in range(max(args.requests, 4 * concurrency) * len(budgets))]
        hook(args.before)
        try:
            for place, budget in enumerate(budgets):
                before = counts(url)
                async with asyncio.timeout(max(1.0, limit.left)):
                    mine = urls[place :: len(budgets)]
                    found: dict[str, Any] = await row(
                        client, mine, fields[budget], concurrency, args.tokens
                    )
                yield {"budget": budget} | found | embedding(before, counts(url))
        finally:
            hook(args.after)
    await client.close()


def hook(command: str) -> None:
    if command:
        subprocess.run(shlex.split(command), check=False)


async def side(
    name: str, url: str, args: argparse.Namespace, fresh: Iterator[str], limit: Limit, rows: Any
) -> None:
    budgets: list[Any] = [None] if name == "vanilla" else args.budgets
    if name == "plugin-max":
        budgets, args = (
            [smallest(args)],
            argparse.Namespace(**{**vars(args), "concurrency": args.concurrency[:1]}),
        )
    async for found in measure(url, budgets, args, fresh, limit):
        rows.append(found)
        print(
            name,
            {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()},
            flush=True,
        )


def smallest(args: argparse.Namespace) -> int:
    return min(budget for budget in args.budgets if isinstance(budget, int))


def run(args: argparse.Namespace, data: dict[str, Any], folder: Path) -> None:
    """All servers, one after the other."""
    limit, fresh = Limit(args.seconds_limit), pictures()
    model = llava_7b(folder / "model") if args.size == "7b" else build_checkpoint(folder / "model")
    options = [
        *SIZES[args.size],
        *args.server_options,
        *(["--enforce-eager"] if args.enforce_eager else []),
    ]
    own = {"vanilla": [], "plugin": ["--plugin", "fsr"]}
    own["plugin-max"] = [*own["plugin"], "--fsr-max-budget", str(smallest(args))]
    for name in args.sides:
        server: dict[str, Any] = {"options": own[name], "rows": []}
        data["servers"][name] = server
        log, began, before = (args.logs or folder) / f"server-{name}.log", time.monotonic(), gpu()
        environment = {**ENVIRONMENT, **({"VLLM_PLUGINS": "none"} if name == "vanilla" else {})}
        try:
            if limit.left <= 0:
                raise TimeoutError("no time left")
            patience = min(args.start_seconds, limit.left)
            with serve(str(model), log, [*options, *own[name]], environment, patience) as url:
                server["start_seconds"] = round(time.monotonic() - began, 1)
                asyncio.run(side(name, url, args, fresh, limit, server["rows"]))
                server["gpu_mib"] = gpu().get("used", 0) - before.get("used", 0)
        except Exception as error:  # what was measured stays, and the next server is tried
            server["error"] = f"{type(error).__name__}: {error}"
            print(name, server["error"][-4000:], flush=True)
        server["log"] = said(log) if log.exists() else {}
        data["seconds"] = round(limit.used, 1)
        write(data, args.out)


def write(data: dict[str, Any], folder: Path) -> None:
    """Both files."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"serving-{'gpu' if 'GPU' in data['machine'] else 'cpu'}"
    (folder / f"{stem}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / f"{stem}.md").write_text(markdown(data), encoding="utf-8")


def markdown(data: dict[str, Any]) -> str:
    """The same as tables."""
    about = "\n".join(f"- {name}: {value}" for name, value in data["machine"].items())
    rows, servers = [], []
    for name, server in data["servers"].items():
        for r in server["rows"]:
            times = [
                f"{r[key]:.2f}" if key in r else "-"
                for key in ("tower_ms_per_image", "select_ms_per_image")
            ]
            share = f"{r['select_share']:.0%}" if "select_share" in r else "-"
            label = name if r["budget"] is None else f"{name}, budget {r['budget']}"
            figures = (f"{r[key]:.0f}" for key in ("ttft_p50_ms", "ttft_p95_ms", "whole_p50_ms"))
            cells = [label, r["concurrency"], r["requests"], f"{r['prompt_tokens']:.0f}"]
            rows.append([*cells, f"{r['requests_per_second']:.2f}", *figures, *times, share])
        log = server.get("log", {})
        told = [
            log.get(key, "-")
            for key in ("weights", "KV cache memory", "KV cache tokens", "concurrency")
        ]
        started = server.get("start_seconds", "-")
        servers.append(
            [name, " ".join(server["options"]), started, *told, server.get("gpu_mib") or "-"]
        )
    rows.sort(key=lambda cells: cells[1])
    head = ("side", "at once", "requests", "prompt tokens", "requests/s", "TTFT p50 ms", "p95 ms", "whole p50 ms",
            "tower ms/image", "select ms/image", "select share")  # fmt: skip
    second = (
        "server",
        "options",
        "start s",
        "weights",
        "KV memory",
        "KV tokens",
        "maximum concurrency",
        "GPU MiB",
    )
    failed = [
        f"- {name}: `{s['error'].splitlines()[0]}`"
        for name, s in data["servers"].items()
        if "error" in s
    ]
    return f"""\
# Serving: {data["size"]}, {"GPU" if "GPU" in data["machine"] else "CPU"}

`{data["command"]}`, {data["seconds"]:.0f} s.

{about}

{data["note"]} Distinct pictures of 576 visual tokens, {data["tokens"]} tokens per answer. Tower and selection are the
worker's own clock (CUDA events on a GPU), the projector counted with the tower; share is selection of both.

{_table(head, rows)}

{_table(second, servers)}
""" + "\n".join(["", "Not finished:", "", *failed, ""] if failed else [])


def _table(head: Any, rows: Any) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _budget(text: str) -> Any:
    return text if text == "off" else int(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="7b")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--budgets", nargs="+", type=_budget, default=["off", 192, 128, 64])
    parser.add_argument(
        "--concurrency", nargs="+", type=int, default=[16, 1, 64, 4], help="most important first"
    )
    parser.add_argument(
        "--requests", type=int, default=16, help="per row, at least four times its concurrency"
    )
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--seconds-limit", type=float, default=1800, help="of the whole run")
    parser.add_argument(
        "--start-seconds", type=float, default=300, help="of one server's start, at most"
    )
    parser.add_argument(
        "--enforce-eager",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="no torch.compile",
    )
    parser.add_argument(
        "--server-options", type=shlex.split, default=[], help="more options of vllm serve"
    )
    parser.add_argument("--before", default="", help="command to run before rows are timed")
    parser.add_argument("--after", default="", help="command to run after them")
    parser.add_argument("--note", default="", help="for the report")
    parser.add_argument("--logs", type=Path, help="folder that keeps the servers' logs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    about = machine("cpu") | {"vLLM": version("vllm"), "transformers": version("transformers")}
    if found := gpu():
        about |= {
            "GPU": found["name"],
            "GPU memory MiB": found["total"],
            "CUDA": torch.version.cuda,
        }
    given = sys.argv[1:] if argv is None else argv
    data: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.serving", *given]),
        "machine": about,
    }
    data |= {
        "note": args.note,
        "size": args.size,
        "tokens": args.tokens,
        "seconds": 0.0,
        "servers": {},
    }
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fsr-serving-") as folder:
        run(args, data, Path(folder))
    print(markdown(data))
    return int(any("error" in server for server in data["servers"].values()))


if __name__ == "__main__":
    sys.exit(main())
