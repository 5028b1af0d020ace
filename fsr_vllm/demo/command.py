"""`fsr-vllm demo`: a real vLLM server with the plugin, asked about pictures at several token
budgets.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MODEL_NAME = "fsr-demo"
BUDGETS: tuple[Any, ...] = ("off", 0.5, 0.22, 0.11)
PHOTO_QUESTIONS = {
    "astronaut": "Who is in this picture?",
    "chelsea": "What animal is this?",
    "coffee": "What stands on the table?",
}
# of the testbed's held-out ones, the first that a question can be asked about, for every family
SCENES = 3
START_SECONDS = 300
# A small model on any machine: no compilation, a fixed piece of memory, nothing fetched, nothing
# reported.
SERVE_OPTIONS = (
    "--plugin", "fsr", "--served-model-name", MODEL_NAME, "--dtype", "float32", "--max-model-len", "2048",
    "--enforce-eager", "--kv-cache-memory-bytes", "268435456", "--limit-mm-per-prompt", '{"image": 2}',
)  # fmt: skip
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


def run(model: str | None = None, log: str | None = None) -> int:
    """Serve the bundled model (or `model`), ask, print the table, stop the server; returns the exit
    status.
    """
    started = time.monotonic()
    asked = scenes() if model is None else photographs()
    if model is None:
        from fsr_vllm.demo import demo_model

        model = str(demo_model())
        print(
            "Model: the small LLaVA of benchmarks.testbed, trained on scenes like these; it never saw these ones."
        )
    with tempfile.TemporaryDirectory(prefix="fsr-demo-") as folder:
        log_path = Path(log or Path(folder) / "server.log")
        with serve(model, log_path) as url:
            print_table(ask_all(url, asked))
    print(f"Server stopped. Total: {time.monotonic() - started:.0f} s.")
    return 0


class Asked(NamedTuple):
    """One question of the demo."""

    picture: str  # data: URL
    question: str
    expected: str | None  # the right answer, where it is known


def scenes() -> list[Asked]:
    """Questions of every family about held-out scenes of the testbed, in order of the scenes'
    numbers.
    """
    import numpy as np
    from PIL import Image

    from benchmarks.testbed.photos import data_url
    from benchmarks.testbed.questions import FAMILIES, ask, good_english
    from benchmarks.testbed.scenes import render, scene

    asked = []
    for number, family in enumerate(FAMILIES):
        numbers = itertools.count()
        for _ in range(SCENES):
            question = None
            while question is None:
                one = scene("test", next(numbers))
                question = ask(one, family, np.random.default_rng([number, one.index]))
            picture = data_url(Image.fromarray(render(one)), "PNG")
            asked.append(Asked(picture, good_english(question.text), question.answer))
    return asked


def photographs() -> list[Asked]:
    """Open questions about photographs, for a model that knows the world."""
    from benchmarks.testbed.photos import data_url, photos

    pictures = {name: data_url(image, size=(672, 672)) for name, image in photos().items()}
    return [
        Asked(pictures[name], question, None)
        for name, question in PHOTO_QUESTIONS.items()
        if name in pictures
    ]


@contextlib.contextmanager
def serve(
    model: str,
    log_path: Path,
    options: Sequence[str] = SERVE_OPTIONS,
    environment: Mapping[str, str] = ENVIRONMENT,
    patience: float = START_SECONDS,
) -> Iterator[str]:
    """A running `vllm serve`; yields its base URL. RuntimeError with the log's end if it is not up
    after `patience`.
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
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # the server is on this machine
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


def ask_all(url: str, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Every question at every budget, each answer streamed."""
    from openai import DefaultHttpxClient, OpenAI

    client = OpenAI(
        base_url=url,
        api_key="unused",
        max_retries=0,
        http_client=DefaultHttpxClient(trust_env=False),
    )
    ask(
        client, asked[0].picture, "Warm up.", 16
    )  # the first request of a server pays for one-time work
    rows = []
    for one in asked:
        for budget in BUDGETS:
            answer = ask(client, one.picture, one.question, budget)
            rows.append(
                {"question": one.question, "expected": one.expected, "budget": budget, **answer}
            )
    return rows


def ask(client: Any, picture: str, question: str, budget: Any) -> dict[str, Any]:
    """One streamed chat completion; returns kept/total, prompt tokens, time to first token and the
    answer.
    """
    started = time.perf_counter()
    response = client.chat.completions.with_raw_response.create(
        model=MODEL_NAME,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": picture}},
                    {"type": "text", "text": question},
                ],
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
    return {
        "tokens": tokens,
        "prompt_tokens": prompt_tokens,
        "ttft": first or 0.0,
        "answer": answer,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """The demo's result: a line per question with its answer at every budget, then what each budget
    costs.
    """
    by_budget = {budget: [row for row in rows if row["budget"] == budget] for budget in BUDGETS}
    width = max(len(row["question"]) for row in rows)
    heads = [f"{budget:.0%}" if isinstance(budget, float) else str(budget) for budget in BUDGETS]
    print(f"\n{'question':<{width}}  " + "  ".join(f"{head:<11}" for head in heads))
    for answers in zip(*by_budget.values(), strict=True):
        cells = [" ".join(row["answer"].split()) + _mark(row) for row in answers]
        print(
            f"{answers[0]['question']:<{width}}  " + "  ".join(f"{cell[:40]:<11}" for cell in cells)
        )
    print(f"\n{'budget':<8} {'visual tokens':>13} {'prompt tokens':>13} {'first token':>12}  right")
    for head, answers in zip(heads, by_budget.values(), strict=True):
        prompt = statistics.mean(row["prompt_tokens"] for row in answers)
        wait = statistics.median(row["ttft"] for row in answers) * 1000
        known = [row for row in answers if row["expected"] is not None]
        right = f"{sum(_right(row) for row in known)} of {len(known)}" if known else "not known"
        print(f"{head:<8} {answers[0]['tokens']:>13} {prompt:>13.0f} {wait:>9.0f} ms  {right}")
    print()


def _right(row: dict[str, Any]) -> bool:
    return row["answer"].strip() == row["expected"]


def _mark(row: dict[str, Any]) -> str:
    if row["expected"] is None:
        return ""
    return " ✓" if _right(row) else " ✗"
