"""A `vllm serve` with the plugin, as a process of its own: for the demo, tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

MODEL_NAME = "fsr-demo"
START_SECONDS = 300
# A small model on any machine: no compilation, a fixed piece of memory, nothing fetched, nothing
# reported.
SERVE_OPTIONS = (
    "--plugin", "fsr", "--served-model-name", MODEL_NAME, "--dtype", "float32", "--max-model-len",
    "2048", "--enforce-eager", "--kv-cache-memory-bytes", "268435456", "--limit-mm-per-prompt",
    '{"image": 2}',
)  # fmt: skip
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def serve(
    model: str,
    log_path: Path,
    options: Sequence[str] = SERVE_OPTIONS,
    environment: Mapping[str, str] = ENVIRONMENT,
    patience: float = START_SECONDS,
) -> Iterator[str]:
    """A running `vllm serve`; yields its base URL.

    RuntimeError with the end of its log where it is not up after `patience` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *options]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    print("$ vllm serve MODEL " + " ".join(command[5:]))
    with log_path.open("w") as log:
        # A session of its own, so that the whole family of processes can be stopped together.
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            _wait_until_healthy(process, f"http://127.0.0.1:{port}", log_path, patience)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _stop(process)


def _wait_until_healthy(
    process: subprocess.Popen[bytes], root: str, log_path: Path, patience: float
) -> None:
    started = time.monotonic()
    # No proxy: the server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        waited = time.monotonic() - started
        with contextlib.suppress(OSError):
            if opener.open(f"{root}/health", timeout=2).status == 200:
                print(f"\rserver is up after {waited:.0f} s" + " " * 70)
                return
        tail = log_path.read_text(errors="replace").strip().splitlines()
        if process.poll() is not None or waited > patience:
            raise RuntimeError(
                f"vllm serve did not come up after {waited:.0f} s; end of its log:\n"
                + "\n".join(tail[-30:])
            )
        if sys.stdout.isatty():
            latest = tail[-1].split("] ")[-1][:70] if tail else ""
            print(f"\rstarting vLLM ... {waited:3.0f} s  {latest:<70}", end="", flush=True)
        time.sleep(1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for sign, patience in ((signal.SIGINT, 30), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
