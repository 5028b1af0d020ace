"""Servers for benchmarks: models without trained weights, their options, and processes to watch."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.published import DTYPE, llava_7b
from benchmarks.testbed import build_checkpoint

MODEL_NAME = "fsr-bench"
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # a machine without a network cannot fetch its kernels
}
NO_PLUGIN = {"VLLM_PLUGINS": "none"}  # no plugin has this name, so none is loaded
PLUGIN = ("--plugin", "fsr")
COMMON = (
    "--served-model-name", MODEL_NAME, "--max-model-len", "2048",
    "--limit-mm-per-prompt", '{"image": 1}',
)  # fmt: skip
SIZES = {
    "7b": (*COMMON, "--dtype", DTYPE, "--load-format", "dummy"),
    "wide": (*COMMON, "--dtype", "float32"),
    "tiny": (*COMMON, "--dtype", "float32"),
}
VISUAL_TOKENS = 576  # of a picture, in every size
# With a GPU: up to 64 requests of whole pictures have to find room, and 16 tokens each.
_KV_BYTES_PER_TOKEN = 2 * 32 * 4096 * 2
_REST_GIB = 18  # weights, activations, graphs and the context of one 7B server
# Coarser than vLLM's own list, so that capture is short, with its largest size and what we ask for.
GRAPHS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512]
# What a server says of its memory and of how it runs, by the name it gets in the report.
LOG = {
    "KV cache tokens": r"KV cache size: ([\d,]+) tokens",
    "KV cache memory": r"Available KV cache memory: ([\d.]+ \w+)",
    "concurrency": r"Maximum concurrency for (.+x)",
    "weights": r"Model loading took (.+?) and",
    "attention": r"[Uu]sing (\w+) attention backend",
    "vision attention": r"[Uu]sing (?:backend )?(\S+) for (?:vit|MMEncoder)",
    "compilation": r"torch.compile (?:takes|took) (.+? in total|.+? s\b)",
    "graphs": r"(Graph capturing finished in .+?),",
    "runner": r"(Using V2 Model Runner)",
    "plugin": r"fsr_vllm: (\S+ is active[^;]*)",
}
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # they are on this machine


def write_model(size: str, path: Path) -> Path:
    """The model folder of a size: LLaVA-1.5-7B's sizes without weights, or small random weights."""
    if size == "7b":
        return llava_7b(path)
    return (
        build_checkpoint(path, hidden_size=768, layers=8)
        if size == "wide"
        else build_checkpoint(path)
    )


def cache(name: str) -> dict[str, str]:
    """A cache of compiled code for each server: two that start at once must not write to one."""
    return {"VLLM_CACHE_ROOT": str(Path.home() / ".cache" / "vllm-bench" / name)}


class Server:
    """One `vllm serve` of its own process session; up once `ready` has said so."""

    def __init__(
        self,
        model: Path,
        options: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        cores: Sequence[int] = (),
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.root = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.options, self.log, self.started = list(options), log, time.monotonic()
        self.seconds: float | None = None  # of its start, once it is up
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        command += [*options, "--host", "127.0.0.1", "--port", self.root.rpartition(":")[2]]
        if cores:
            command = ["taskset", "-c", ",".join(map(str, cores)), *command]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, **environment},
                start_new_session=True,
            )

    def ready(self) -> bool:
        """Is it up? RuntimeError with the end of its log if it has ended instead."""
        if self.seconds is None:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server has ended; its log ends:\n{self.tail()}")
            with suppress(OSError):
                if _NO_PROXY.open(f"{self.root}/health", timeout=2).status == 200:
                    self.seconds = round(time.monotonic() - self.started, 1)
        return self.seconds is not None

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-lines:])

    def cpu(self) -> tuple[float, float]:
        """CPU seconds so far of the API server's processes and of the engine's."""
        api = engine = 0.0
        with suppress(psutil.NoSuchProcess):
            waiting = [(psutil.Process(self.process.pid), False)]
            while waiting:
                process, inside = waiting.pop()
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    inside = inside or any("EngineCore" in part for part in process.cmdline())
                    engine += (times.user + times.system) * inside
                    api += (times.user + times.system) * (not inside)
                    waiting += [(child, inside) for child in process.children()]
        return api, engine

    def get(self, path: str) -> Any:
        """The JSON of a GET; None where it is not answered with 200."""
        with suppress(OSError, ValueError):
            return json.loads(_NO_PROXY.open(f"{self.root}{path}", timeout=60).read())
        return None

    def post(self, path: str) -> bool:
        """An empty POST; whether it was answered with 200."""
        request = urllib.request.Request(f"{self.root}{path}", method="POST")
        with suppress(OSError):
            return bool(_NO_PROXY.open(request, timeout=120).status == 200)
        return False

    def stats(self) -> dict[str, float]:
        """The worker's statistics of the plugin; empty where there is none."""
        workers = (self.get("/v1/fsr/stats") or {}).get("workers")
        return dict(workers[0]) if workers else {}

    def said(self) -> dict[str, str]:
        """What the log says about LOG, the last time it says so."""
        text = self.log.read_text(errors="replace")
        found = {name: re.findall(pattern, text) for name, pattern in LOG.items()}
        return {name: values[-1] for name, values in found.items() if values}


def stop(servers: Sequence[Server]) -> None:
    """End all of them, together, with what they started."""
    for sign, patience in ((signal.SIGINT, 15), (signal.SIGKILL, 10)):
        running = [server for server in servers if server.process.poll() is None]
        for server in servers:
            with suppress(ProcessLookupError):
                os.killpg(server.process.pid, sign)
        for server in running:
            with suppress(subprocess.TimeoutExpired):
                server.process.wait(patience)


def gpu() -> dict[str, Any]:
    """Name, used and whole memory (MiB) of the first GPU; empty where there is none.

    Asks the driver's tool, so that the benchmark itself takes no memory there.
    """
    query = "--query-gpu=name,memory.used,memory.total"
    try:
        found = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout.splitlines()[0]  # fmt: skip
        name, used, total = found.split(", ")
        return {"name": name, "used": int(used), "total": int(total)}
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return {}


def embedding(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Milliseconds per image in tower and projector, and in selection, between two readings."""
    images = after.get("images", 0) - before.get("images", 0)
    if not images:
        return {}
    spent = {
        part: after.get(f"seconds_{part}", 0) - before.get(f"seconds_{part}", 0)
        for part in ("tower", "select")
    }
    return {f"{part}_ms_per_image": 1000 * seconds / images for part, seconds in spent.items()}


def memory(size: str, card_mib: int, servers: int) -> tuple[list[str], bool]:
    """Options that let the servers share a card or a machine, and whether only one vanilla fits."""
    if size != "7b":
        return ["--kv-cache-memory-bytes", str(256 << 20 if size == "tiny" else 1 << 30)], False
    needed = 64 * (VISUAL_TOKENS + 64) * _KV_BYTES_PER_TOKEN / 2**30
    single = servers > 2 and card_mib / 1024 * 0.97 < servers * (needed + _REST_GIB)
    options = [
        "--kv-cache-memory-bytes",
        str(int(needed * 2**30)),
        "--gpu-memory-utilization",
        "0.2",
    ]
    graphs = json.dumps({"cudagraph_capture_sizes": GRAPHS})
    return [*options, "--attention-backend", "FLASH_ATTN", "--compilation-config", graphs], single


def cores(servers: int) -> list[list[int]]:
    """Equal shares of the machine's cores, one left for the client."""
    free = sorted(os.sched_getaffinity(0))[1:]
    share = len(free) // servers
    if not share:
        raise SystemExit(f"--pin: {servers} servers need at least {servers + 1} cores")
    return [free[n * share : (n + 1) * share] for n in range(servers)]


def profiler(folder: Path) -> list[str]:
    """Options for profiles of the engine, which start and stop by request."""
    config = {
        "profiler": "torch",
        "torch_profiler_dir": str(folder.resolve()),
        "torch_profiler_with_stack": False,
        "torch_profiler_dump_cuda_time_total": False,
        "ignore_frontend": True,
    }
    return ["--profiler-config", json.dumps(config)]


def reason(error: BaseException) -> str:
    """An error in one line; of a group, its first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
