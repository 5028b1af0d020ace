"""`fsr-vllm demo`: a real server, asked about pictures at several token budgets."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import demo_model
from .asked import Asked, photographs, scenes
from .serving import MODEL_NAME, serve

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletionContentPartParam

BUDGETS: tuple[str | float, ...] = ("off", 0.5, 0.22, 0.11)


def run(model: str | None = None, log: str | None = None) -> int:
    """Serve the bundled model (or `model`), ask, print a table, stop; returns the exit status."""
    started = time.monotonic()
    asked = scenes() if model is None else photographs()
    if model is None:
        model = str(demo_model())
        print("Model: the bundled small LLaVA, trained on scenes like these; it never saw these.")
    with tempfile.TemporaryDirectory(prefix="fsr-demo-") as folder:
        log_path = Path(log or Path(folder) / "server.log")
        with serve(model, log_path) as url:
            print_table(ask_all(url, asked))
    print(f"Server stopped. Total: {time.monotonic() - started:.0f} s.")
    return 0


def ask_all(url: str, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Every question at every budget, each answer streamed."""
    from openai import DefaultHttpxClient, OpenAI

    client = OpenAI(
        base_url=url,
        api_key="unused",
        max_retries=0,
        http_client=DefaultHttpxClient(trust_env=False),
    )
    # The first request of a server pays for one-time work.
    ask(client, asked[0].picture, "Warm up.", 16)
    rows = []
    for one in asked:
        for budget in BUDGETS:
            answer = ask(client, one.picture, one.question, budget)
            rows.append(
                {"question": one.question, "expected": one.expected, "budget": budget, **answer}
            )
    return rows


def ask(client: OpenAI, picture: str, question: str, budget: str | float) -> dict[str, Any]:
    """One streamed chat completion: kept/total, prompt tokens, time to first token, the answer."""
    content: list[ChatCompletionContentPartParam] = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": question},
    ]
    started = time.perf_counter()
    response = client.chat.completions.with_raw_response.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": content}],
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
    return {
        "tokens": response.headers["x-fsr-visual-tokens"],
        "prompt_tokens": prompt_tokens,
        "ttft": first or 0.0,
        "answer": answer,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line per question with its answer at every budget, then what each budget costs."""
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
