"""A server without the plugin and with it, one after the other, over budgets and concurrencies.

    python -m benchmarks.serving                       # a GPU with 20 GiB or more; five minutes
    python -m benchmarks.serving --size tiny           # the same path on any machine

Weights of "7b" are random (`--load-format dummy`): costs are the real model's, answers mean
nothing. Every request brings a picture of its own, so no cache of images helps. Servers, in this
order: vanilla (no plugin loaded), plugin (all budgets in one server), and plugin-max
(`--fsr-max-budget` at the smallest budget: what vLLM then has left for its KV cache; one
concurrency). Each is written to serving-gpu.json and .md (or -cpu) when it is done, so a later
failure costs nothing; --seconds-limit leaves out what no longer fits. --before and --after run a
command around what is timed. For differences of a few per cent use `benchmarks.serving.paired`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.report import machine

from .analysis import table
from .load import Pictures, at_once, body, figures
from .servers import (
    NO_PLUGIN,
    PLUGIN,
    SIZES,
    VISUAL_TOKENS,
    Server,
    embedding,
    gpu,
    memory,
    stop,
    write_model,
)

SIDES = ("vanilla", "plugin", "plugin-max")
QUESTION = "What is this?"
SHOWN = {
    "requests": 0, "prompt_tokens": 0, "requests_per_second": 2, "ttft_ms": 0, "ttft_p95_ms": 0,
    "whole_ms": 0, "tower_ms_per_image": 2, "select_ms_per_image": 2,
}  # fmt: skip
HEAD = (
    "side", "at once", "requests", "prompt tokens", "requests/s", "TTFT p50 ms", "p95 ms",
    "whole p50 ms", "tower ms/image", "select ms/image", "select share",
)  # fmt: skip


class Sweep:
    """All servers, one after the other, and the seconds that are left for them."""

    def __init__(self, args: argparse.Namespace, data: dict[str, Any], folder: Path) -> None:
        self.args, self.data, self.folder = args, data, folder
        self.began, self.pictures = time.monotonic(), Pictures(0)

    @property
    def left(self) -> float:
        return float(self.args.seconds_limit - (time.monotonic() - self.began))

    def all(self) -> int:
        """The number of servers that failed."""
        model = write_model(self.args.size, self.folder / "model")
        for name in self.args.sides:
            found: dict[str, Any] = {"options": self.own(name), "rows": []}
            self.data["servers"][name] = found
            log = (self.args.logs or self.folder) / f"server-{name}.log"
            try:
                self.side(name, model, log, found)
            except Exception as error:  # what was measured stays, and the next server is tried
                found["error"] = f"{type(error).__name__}: {error}"
                print(name, found["error"][-4000:], flush=True)
            self.data["seconds"] = round(time.monotonic() - self.began, 1)
            write(self.data, self.args.out)
        return sum("error" in found for found in self.data["servers"].values())

    def own(self, name: str) -> list[str]:
        """The options that only this server has."""
        if name == "vanilla":
            return []
        most = ["--fsr-max-budget", str(self.smallest())] if name == "plugin-max" else []
        return [*PLUGIN, *most]

    def smallest(self) -> int:
        return min(budget for budget in self.args.budgets if isinstance(budget, int))

    def side(self, name: str, model: Path, log: Path, found: dict[str, Any]) -> None:
        """One server: its start, and its rows as they come."""
        args, before = self.args, gpu()
        if self.left <= 0:
            raise TimeoutError("no time left")
        small = memory(args.size, 0, 1)[0] if args.size != "7b" else []  # a 7B server takes all
        options = [*SIZES[args.size], *small, *args.server_options, *found["options"]]
        options += ["--enforce-eager"] if args.enforce_eager else []
        server = Server(model, options, NO_PLUGIN if name == "vanilla" else {}, log)
        try:
            patience = min(args.start_seconds, self.left)
            while not server.ready():
                if time.monotonic() - server.started > patience:
                    raise TimeoutError(f"not up after {patience:.0f} s:\n{server.tail()}")
                time.sleep(0.5)
            found |= {"start_seconds": server.seconds}
            budgets: list[Any] = [None] if name == "vanilla" else args.budgets
            budgets = [self.smallest()] if name == "plugin-max" else budgets
            many = args.concurrency[:1] if name == "plugin-max" else args.concurrency
            self.rows(name, server, budgets, many, found["rows"])
            found["gpu_mib"] = gpu().get("used", 0) - before.get("used", 0)
        finally:
            stop([server])
            found["log"] = server.said()

    def rows(
        self, name: str, server: Server, budgets: list[Any], many: list[int], rows: list[Any]
    ) -> None:
        """A row for each concurrency and budget, after the one-time work of both."""
        for budget in budgets:
            self.row(server, budget, 1, 2)
            self.row(server, budget, min(16, max(many)), 2 * min(16, max(many)))
        for concurrency in many:
            hook(self.args.before)
            try:
                for budget in budgets:
                    count = max(self.args.requests, 4 * concurrency)
                    time.sleep(1.1 if budget is not None else 0)  # readings may be a second old
                    before = server.stats() if budget is not None else {}
                    row = self.row(server, budget, concurrency, count)
                    time.sleep(1.1 if before else 0)
                    found = embedding(before, server.stats()) if before else {}
                    rows.append({"budget": budget, "concurrency": concurrency} | row | found)
                    shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
                    print(name, budget, concurrency, shown, flush=True)
            finally:
                hook(self.args.after)

    def row(
        self, server: Server, budget: str | int | None, concurrency: int, count: int
    ) -> dict[str, Any]:
        fields = {} if budget is None else {"fsr_budget": budget}
        requests = [
            body(picture, QUESTION, self.args.tokens, fields)
            for picture in self.pictures.take(count)
        ]
        if self.left <= 0:
            raise TimeoutError("no time left")
        started = time.perf_counter()
        answers = asyncio.run(
            asyncio.wait_for(at_once(server.root, requests, concurrency), self.left)
        )
        return figures(answers, time.perf_counter() - started)


def hook(command: str) -> None:
    if command:
        subprocess.run(shlex.split(command), check=False)


def write(data: dict[str, Any], folder: Path) -> None:
    """Both files."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"serving-{'gpu' if 'GPU' in data['machine'] else 'cpu'}"
    (folder / f"{stem}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / f"{stem}.md").write_text(markdown(data), encoding="utf-8")


def markdown(data: dict[str, Any]) -> str:
    """The same as tables."""
    about = "\n".join(f"- {name}: {value}" for name, value in data["machine"].items())
    rows, servers, failed = [], [], []
    for name, server in data["servers"].items():
        for r in server["rows"]:
            label = name if r["budget"] is None else f"{name}, budget {r['budget']}"
            cells = [f"{r[key]:.{digits}f}" if key in r else "-" for key, digits in SHOWN.items()]
            select, tower = r.get("select_ms_per_image"), r.get("tower_ms_per_image", 0)
            share = "-" if select is None else f"{select / max(1e-9, select + tower):.0%}"
            rows.append([label, r["concurrency"], *cells, share])
        log = server.get("log", {})
        said = ("weights", "KV cache memory", "KV cache tokens", "concurrency")
        told = [server.get("start_seconds", "-"), *(log.get(key, "-") for key in said)]
        servers.append([name, " ".join(server["options"]), *told, server.get("gpu_mib") or "-"])
        if "error" in server:
            failed.append(f"- {name}: `{server['error'].splitlines()[0]}`")
    rows.sort(key=lambda cells: cells[1])
    second = ("server", "options", "start s", "weights", "KV memory", "KV tokens")
    parts = [
        f"# Serving: {data['size']}, {'GPU' if 'GPU' in data['machine'] else 'CPU'}",
        f"`{data['command']}`, {data['seconds']:.0f} s.",
        about,
        f"{data['note']} Distinct pictures of {VISUAL_TOKENS} visual tokens, {data['tokens']}"
        " tokens per answer. Tower and selection are the\nworker's own clock (CUDA events on a"
        " GPU), the projector counted with the tower; share is selection of both.",
        table(HEAD, rows),
        table([*second, "maximum concurrency", "GPU MiB"], servers),
        *(["Not finished:", "\n".join(failed)] if failed else []),
    ]
    return "\n\n".join(parts) + "\n"


def _budget(text: str) -> str | int:
    return text if text == "off" else int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=tuple(SIZES), default="7b")
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add("--budgets", nargs="+", type=_budget, default=["off", 192, 128, 64])
    add("--concurrency", nargs="+", type=int, default=[16, 1, 64, 4], help="important ones first")
    add("--requests", type=int, default=16, help="per row, at least four times its concurrency")
    add("--tokens", type=int, default=16, help="of each answer")
    add("--seconds-limit", type=float, default=1800, help="of the whole run")
    add("--start-seconds", type=float, default=300, help="of one server's start, at most")
    add("--enforce-eager", action=argparse.BooleanOptionalAction, default=True)
    add("--server-options", type=shlex.split, default=[], help="more options of vllm serve")
    add("--before", default="", help="command to run before rows are timed")
    add("--after", default="", help="command to run after them")
    add("--note", default="", help="for the report")
    add("--logs", type=Path, help="folder that keeps the servers' logs")
    add("--out", type=Path, default=Path(__file__).parents[1] / "results")
    args = parser.parse_args(argv)
    about = machine("cpu") | {name: version(name.lower()) for name in ("vLLM", "transformers")}
    about |= {"GPU": card["name"], "GPU memory MiB": card["total"]} if (card := gpu()) else {}
    given = sys.argv[1:] if argv is None else argv
    data: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.serving", *given]),
        "machine": about, "note": args.note, "size": args.size, "tokens": args.tokens,
        "seconds": 0.0, "servers": {},
    }  # fmt: skip
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fsr-serving-") as folder:
        failed = Sweep(args, data, Path(folder)).all()
    print(markdown(data))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
