"""Servers with and without the plugin, up at once and asked in turns: differences to be trusted.

    python -m benchmarks.serving.paired     # a GPU with 75 GiB or more; seven minutes
    python -m benchmarks.serving.paired --size tiny --concurrency 1 4 --eager     # any machine

Arms: vanilla, a second vanilla server (the control), and a server with the plugin, which is asked
for "off", for 64 tokens with one question and with a new question each, and for 128. A round is a
block of every arm, in shuffled order, at one concurrency; the one that had least time is next.
Results are written after each round, so that a run that is cut off keeps what it has; --resume adds
to a file and exchanges the servers' places. Ends with 3 where a server did not come up.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.report import machine

from .analysis import markdown, save
from .load import Answer, Pictures, at_once, body, figures, questions
from .options import ARMS, QUESTION, arguments, data_file, opened
from .servers import (
    NO_PLUGIN,
    PLUGIN,
    SIZES,
    Server,
    cache,
    cores,
    embedding,
    gpu,
    memory,
    profiler,
    reason,
    stop,
    write_model,
)

SPARE = 12.0  # seconds for stopping the servers
CLOCK = 12.0  # for the workers' own clocks
TRACE = 25.0  # and for the traces


class Run:
    """One run: its servers, its pictures, its clock, and the data that it adds to."""

    def __init__(self, args: argparse.Namespace, data: dict[str, Any], folder: Path) -> None:
        self.args, self.data, self.folder = args, data, folder
        self.began = time.monotonic()
        self.number = data["runs"] = data["runs"] + 1
        self.pictures, self.questions = Pictures(self.number), questions(self.number)
        self.servers: dict[str, Server] = {}
        self.order = random.Random(self.number)

    @property
    def left(self) -> float:
        """Seconds until the servers have to be stopped."""
        spare = SPARE + (TRACE if self.args.trace else 0)
        return float(self.args.seconds - spare - (time.monotonic() - self.began))

    def start(self) -> None:
        """Start all servers at once and make pictures until they are up."""
        args = self.args
        model = write_model(args.size, self.folder / "model")
        wanted = list(dict.fromkeys(ARMS[arm][0] for arm in args.arms))
        card = gpu()
        shared, single = memory(args.size, card.get("total", 0), len(wanted))
        if single and "again" in wanted:
            wanted.remove("again")
        turn = (self.number - 1) % len(wanted)
        wanted = wanted[turn:] + wanted[:turn]  # so that no server is always first
        places = cores(len(wanted)) if args.pin else [[] for _ in wanted]
        for name, place in zip(wanted, places, strict=True):
            options = [*SIZES[args.size], *shared, *args.server_options]
            options += ["--enforce-eager"] if args.eager else []
            options += PLUGIN if name == "plugin" else []
            traced = profiler(self.folder / name) if args.trace else []
            environment = cache(name) | ({} if name == "plugin" else NO_PLUGIN)
            log = (args.logs or self.folder) / f"server-{name}.log"
            self.servers[name] = Server(model, [*options, *traced], environment, log, place)
            self.data["servers"][name] = {"options": options, "cores": place, "seconds": None}
        self._wait()
        for name, server in self.servers.items():
            self.data["servers"][name] |= {"seconds": server.seconds, "log": server.said()}
        if card:
            self.data["machine"]["GPU MiB used by all servers"] = gpu()["used"] - card["used"]

    def _wait(self) -> None:
        patience = min(self.args.start_seconds, self.left)
        while time.monotonic() - self.began < patience:
            for name, server in list(self.servers.items()):
                try:
                    server.ready()
                except RuntimeError as error:
                    self._lose(name, str(error))
            if all(server.seconds for server in self.servers.values()):
                return
            if len(self.pictures) < self.args.pictures:
                self.pictures.make(50)
            else:
                time.sleep(0.5)
        for name in [name for name, server in self.servers.items() if not server.seconds]:
            self._lose(name, f"not up after {patience:.0f} s:\n{self.servers[name].tail()}")

    def _lose(self, name: str, why: str) -> None:
        """Go on without a server."""
        print(f"{name}: {why}", flush=True)
        self.data["servers"][name]["error"] = why
        stop([self.servers.pop(name)])

    def server(self, arm: str) -> Server | None:
        """Where an arm is asked; the first vanilla server also where there is no second one."""
        name = ARMS[arm][0]
        started = name in self.data["servers"]
        return self.servers.get(name if started or name != "again" else "vanilla")

    def send(self, arm: str, concurrency: int, count: int) -> tuple[list[Answer], float]:
        """Ask `count` requests of an arm; the answers and how many seconds they took."""
        server = self.server(arm)
        assert server
        _, fields, new = ARMS[arm]
        requests = [
            body(picture, next(self.questions) if new else QUESTION, self.args.tokens, fields)
            for picture in self.pictures.take(count)
        ]
        started = time.perf_counter()
        answers = asyncio.run(at_once(server.root, requests, concurrency))
        return answers, time.perf_counter() - started

    def block(self, arm: str, concurrency: int) -> dict[str, Any]:
        """One block and its figures, or the error that it ended in."""
        server = self.server(arm)
        assert server
        cpu = server.cpu()
        try:
            count = max(self.args.requests, 2 * concurrency)
            answers, seconds = self.send(arm, concurrency, count)
        except Exception as error:  # the other arms go on
            return {"error": reason(error)}
        found: dict[str, Any] = figures(answers, seconds)
        for name, spent, before in zip(("api", "engine"), server.cpu(), cpu, strict=True):
            found[f"{name}_cpu_ms"] = 1000 * (spent - before) / len(answers)
        return found

    def round(self, concurrency: int, number: int) -> None:
        """A block of every arm whose server is up, in shuffled order."""
        arms = [arm for arm in self.args.arms if self.server(arm)]
        self.order.shuffle(arms)
        for place, arm in enumerate(arms):
            where = {"run": self.number, "round": number, "concurrency": concurrency, "arm": arm}
            found = where | {"place": place} | self.block(arm, concurrency)
            self.data["blocks"].append(found)
            shown = ("requests_per_second", "ttft_ms", "later_token_ms", "api_cpu_ms")
            text = " ".join(f"{key} {found[key]:.2f}" for key in shown if key in found)
            print(f"{number} at {concurrency}: {arm}: {found.get('error', text)}", flush=True)

    def warm(self) -> None:
        """One-time work of every arm, alone and in a batch: compilers, caches, thread pools."""
        for arm in self.args.arms:
            for concurrency, count in ((1, 2), (max(self.args.concurrency),) * 2):
                if self.server(arm) and self.left > 0:
                    try:
                        self.send(arm, concurrency, count)
                    except Exception as error:
                        print(f"warming up {arm}: {reason(error)}", flush=True)

    def measure(self) -> None:
        """Rounds while there is time for one more; the concurrency that had least is next."""
        spent = dict.fromkeys(self.args.concurrency, 0.0)
        longest = dict.fromkeys(self.args.concurrency, 0.0)
        for number in range(self.args.rounds * len(spent)):
            fitting = [c for c in spent if 1.2 * longest[c] + CLOCK < self.left]
            if not fitting:
                return
            concurrency = min(fitting, key=lambda c: spent[c])
            started = time.monotonic()
            self.round(concurrency, number)
            seconds = time.monotonic() - started
            spent[concurrency] += seconds
            longest[concurrency] = max(longest[concurrency], seconds)
            self.write()

    def clock(self) -> None:
        """The worker's own clock for each arm of the plugin, alone."""
        for arm in [arm for arm in self.args.arms if ARMS[arm][0] == "plugin"]:
            server = self.server(arm)
            if server and self.left > 0:
                readings = []
                for count in (0, self.args.requests):
                    self.send(arm, 1, count)
                    time.sleep(1.1)  # the server gives readings that may be a second old
                    readings.append(server.stats())
                self.data["embedding"][arm] = embedding(*readings)
        self.write()

    def trace(self) -> None:
        """One profile of each kind of server, under three requests of each of its arms, alone."""
        for name in [name for name in self.servers if name != "again"]:
            server, started = self.servers[name], time.monotonic()
            server.post("/start_profile")
            for arm in [arm for arm in self.args.arms if ARMS[arm][0] == name]:
                self.send(arm, 1, 3)
            server.post("/stop_profile")
            files = sorted(
                (self.folder / name).glob("**/*.gz"), key=lambda path: path.stat().st_size
            )
            if files:
                shutil.copy(files[-1], self.args.trace / f"trace-{name}.json.gz")
            print(f"trace of {name}: {time.monotonic() - started:.0f} s", flush=True)

    def write(self) -> None:
        self.data["seconds"] = round(time.monotonic() - self.began, 1)
        save(self.data, data_file(self.args, self.data["machine"]))

    def all(self) -> int:
        """The whole run; its exit status."""
        try:
            self.start()
            self.warm()
            self.measure()
            self.clock()
            if self.args.trace and self.servers:
                self.trace()
        finally:
            stop(list(self.servers.values()))
            self.write()
        lost = any("error" in server for server in self.data["servers"].values())
        return 3 if lost else int(any("error" in block for block in self.data["blocks"]))


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv, __doc__ or "")
    about = machine("cpu") | {name: version(name.lower()) for name in ("vLLM", "transformers")}
    about |= {"GPU": card["name"], "GPU memory MiB": card["total"]} if (card := gpu()) else {}
    about |= {"fsr_vllm commit": args.commit} if args.commit else {}
    about |= {"note": args.note} if args.note else {}
    given = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "benchmarks.serving.paired", *given])
    data = opened(args, about, command)
    for folder in filter(None, (args.logs, args.trace, args.out)):
        folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    with tempfile.TemporaryDirectory(prefix="fsr-paired-", ignore_cleanup_errors=True) as folder:
        status = Run(args, data, Path(folder)).all()
    print(markdown(data))
    return status


if __name__ == "__main__":
    sys.exit(main())
