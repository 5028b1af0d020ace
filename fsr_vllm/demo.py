"""`fsr-vllm demo`: a real vLLM server with the plugin, asked about real photographs at several token budgets."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MODEL_NAME = "fsr-demo"
BUDGETS: tuple[Any, ...] = ("off", 128, 64)
QUESTIONS = {
    "astronaut": "Who is in this picture?",
    "chelsea": "What animal is this?",
    "coffee": "What stands on the table?",
}
START_SECONDS = 300
# A small model on any machine: no compilation, a fixed piece of memory, nothing fetched, nothing reported.
SERVE_OPTIONS = (
    "--plugin", "fsr", "--served-model-name", MODEL_NAME, "--dtype", "float32", "--max-model-len", "2048",
    "--enforce-eager", "--kv-cache-memory-bytes", "268435456", "--limit-mm-per-prompt", '{"image": 2}',
)  # fmt: skip
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


def run(model: str | None = None, log: str | None = None) -> int:
    """Build (or take) a checkpoint, serve it, ask, print the table, stop the server; returns the exit status."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fsr-demo-") as folder:
        if model is None:
            from fsr_vllm.testbed.checkpoint import build_checkpoint

            model = str(build_checkpoint(Path(folder) / "model"))
            print("Model: a small LLaVA-1.5 architecture with random weights. Its answers mean nothing;")
            print("what is real is the server, the photographs, the token counts and the times.")
        log_path = Path(log or Path(folder) / "server.log")
        with serve(model, log_path) as url:
            print_table(ask_all(url))
    print(f"Server stopped. Total: {time.monotonic() - started:.0f} s.")
    return 0


@contextlib.contextmanager
def serve(
    model: str, log_path: Path, options: Sequence[str] = SERVE_OPTIONS, environment: Mapping[str, str] = ENVIRONMENT
) -> Iterator[str]:
    """A running `vllm serve`; yields its base URL. RuntimeError with the log's end if it does not come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *options]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    print("$ vllm serve MODEL " + " ".join(command[5:]))
    with log_path.open("w") as log:
        # A session of its own, so that the whole family of processes can be stopped together.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True
        )
        try:
            _wait_until_healthy(process, f"http://127.0.0.1:{port}", log_path)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _stop(process)


def _wait_until_healthy(process: subprocess.Popen[bytes], root: str, log_path: Path) -> None:
    started = time.monotonic()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine
    while True:
        waited = time.monotonic() - started
        with contextlib.suppress(OSError):
            if opener.open(f"{root}/health", timeout=2).status == 200:
                print(f"\rserver is up after {waited:.0f} s" + " " * 70)
                return
        tail = log_path.read_text(errors="replace").strip().splitlines()
        if process.poll() is not None or waited > START_SECONDS:
            raise RuntimeError(
                f"vllm serve did not come up after {waited:.0f} s; end of its log:\n" + "\n".join(tail[-30:])
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


def ask_all(url: str) -> list[dict[str, Any]]:
    """Every photograph with its question at every budget, each answer streamed."""
    from openai import DefaultHttpxClient, OpenAI

    from fsr_vllm.testbed.photos import data_url, photos

    client = OpenAI(base_url=url, api_key="unused", max_retries=0, http_client=DefaultHttpxClient(trust_env=False))
    pictures = {name: data_url(image, size=(672, 672)) for name, image in photos().items() if name in QUESTIONS}
    first = next(iter(pictures))
    ask(client, pictures[first], "Warm up.", 32)  # the first request of a server pays for one-time work
    rows = []
    for name, picture in pictures.items():
        for budget in BUDGETS:
            rows.append({"photo": name, "budget": budget, **ask(client, picture, QUESTIONS[name], budget)})
    return rows


def ask(client: Any, picture: str, question: str, budget: Any) -> dict[str, Any]:
    """One streamed chat completion; returns kept/total, prompt tokens, time to first token and the answer."""
    started = time.perf_counter()
    response = client.chat.completions.with_raw_response.create(
        model=MODEL_NAME,
        messages=[
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}],
            }
        ],
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"fsr_budget": budget},
    )
    first, answer, prompt_tokens = None, "", 0
    for chunk in response.parse():
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - started
            answer += chunk.choices[0].delta.content
        if chunk.usage:
            prompt_tokens = chunk.usage.prompt_tokens
    tokens = response.headers["x-fsr-visual-tokens"]
    return {"tokens": tokens, "prompt_tokens": prompt_tokens, "ttft": first or 0.0, "answer": answer}


def print_table(rows: list[dict[str, Any]]) -> None:
    """The demo's result, one line per request."""
    print(f"\n{'photo':<10} {'budget':>6} {'visual tokens':>13} {'prompt':>6} {'first token':>11}  answer")
    for row in rows:
        answer = " ".join(row["answer"].split())[:44]
        print(
            f"{row['photo']:<10} {row['budget']!s:>6} {row['tokens']:>13} {row['prompt_tokens']:>6} "
            f"{row['ttft'] * 1000:>8.0f} ms  {answer}"
        )
    print()
