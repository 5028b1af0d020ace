"""One server with the plugin: every method it offers is asked once, and its answer is checked.

    python -m benchmarks.serving.check --size tiny --eager      # any machine, about a minute

For a machine that is new, a GPU above all: does the server come up, does every method run in it and
keep as many tokens as asked for? Writes check.json into --out after each method; ends with 1 where
anything failed. Nothing is timed but the start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .load import Pictures, at_once, body
from .servers import (
    PLUGIN,
    SIZES,
    VISUAL_TOKENS,
    Server,
    cache,
    gpu,
    memory,
    reason,
    stop,
    write_model,
)

BUDGET = 64


def asked(root: str, picture: bytes, fields: dict[str, Any]) -> int:
    """The prompt's tokens of one request."""
    request = body(picture, "Is there red left of two big cat?", 4, fields)
    return asyncio.run(at_once(root, [request], 1))[0].prompt


def check(server: Server, found: dict[str, Any], write: Callable[[], None]) -> None:
    """Every method alone, then pictures of two budgets in one batch; `found` says what is wrong."""
    pictures = Pictures(0)
    off = asked(server.root, pictures.take(1)[0], {"fsr_budget": "off"})
    config = server.get("/v1/fsr/config") or {}
    found |= {"config": config, "off": off, "methods": {}}
    for method in config.get("methods", []):
        fields = {"fsr_budget": BUDGET, "fsr_method": method}
        began = time.monotonic()
        try:
            kept = asked(server.root, pictures.take(1)[0], fields) - off + VISUAL_TOKENS
            word = "right" if kept == BUDGET else f"kept {kept}"
        except Exception as error:  # the others are asked all the same
            word = reason(error)
        found["methods"][method] = word
        print(f"{method}: {word}, {time.monotonic() - began:.1f} s", flush=True)
        write()
    budgets: list[Any] = ["off", BUDGET, 128, "off", 2 * BUDGET, 32]
    requests = [
        body(picture, f"Is there {budget}?", 4, {"fsr_budget": budget})
        for picture, budget in zip(pictures.take(len(budgets)), budgets, strict=True)
    ]
    answers = asyncio.run(at_once(server.root, requests, len(requests)))
    found["together"] = sorted(answer.prompt for answer in answers)
    found["stats"] = server.stats()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="7b")
    parser.add_argument("--eager", action="store_true", help="no compilation, no CUDA graphs")
    parser.add_argument("--start-seconds", type=float, default=150, help="of the start, at most")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"gpu": gpu().get("name"), "torch": torch.__version__, "error": None}

    def write() -> None:
        (args.out / "check.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory(prefix="fsr-check-") as folder:
        model = write_model(args.size, Path(folder) / "model")
        options = [*SIZES[args.size], *memory(args.size, 0, 1)[0], *PLUGIN]
        options += ["--enforce-eager"] if args.eager else []
        server = Server(model, options, cache("plugin"), args.out / "server-check.log")
        try:
            while not server.ready():
                if time.monotonic() - server.started > args.start_seconds:
                    raise TimeoutError(f"not up after {args.start_seconds:.0f} s:\n{server.tail()}")
                time.sleep(0.5)
            print(f"up after {server.seconds} s", flush=True)
            found |= {"start_seconds": server.seconds, "log": server.said()}
            check(server, found, write)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
            print(found["error"], flush=True)
        finally:
            stop([server])
            write()
    right = found.get("methods") and set(found["methods"].values()) == {"right"}
    print("all right" if right and not found["error"] else "SOMETHING IS WRONG", flush=True)
    return int(not right or found["error"] is not None)


if __name__ == "__main__":
    sys.exit(main())
