"""The arms, the options and the file of `benchmarks.serving.paired`."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .analysis import BASE, CONTROL, OFF
from .servers import SIZES

QUESTION = "Is there red left of two big cat?"  # six words, as new ones have
# By arm: the server, the fields of a request, and whether each request has a question of its own.
ARMS: dict[str, tuple[str, dict[str, Any], bool]] = {
    BASE: ("vanilla", {}, False),
    CONTROL: ("again", {}, False),
    OFF: ("plugin", {"fsr_budget": "off"}, False),
    "64": ("plugin", {"fsr_budget": 64}, False),
    "64, new question": ("plugin", {"fsr_budget": 64}, True),
    "128": ("plugin", {"fsr_budget": 128}, False),
}


def data_file(args: argparse.Namespace, about: dict[str, Any]) -> Path:
    return Path(args.out) / f"paired-{'gpu' if 'GPU' in about else 'cpu'}.json"


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What has to be equal for two runs to be added up."""
    names = ("size", "tokens", "requests", "server_options", "eager", "pin")
    return {name: getattr(args, name) for name in names}


def opened(args: argparse.Namespace, about: dict[str, Any], command: str) -> dict[str, Any]:
    """The data of earlier runs with --resume, else of none."""
    new = {"command": command, "settings": settings(args), "machine": about, "seconds": 0.0}
    path, same = data_file(args, about), ("CPU", "GPU", "vLLM", "fsr_vllm commit")
    if args.resume and path.exists():
        old: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if old["settings"] != new["settings"] or any(
            old["machine"].get(key) != about.get(key) for key in same
        ):
            raise SystemExit(f"--resume: {path} has other settings or is of another machine")
        return old | {"servers": {}}
    return new | {"runs": 0, "servers": {}, "embedding": {}, "blocks": []}


def arguments(argv: Sequence[str] | None, about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="7b")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 64, 16, 4])
    parser.add_argument(
        "--requests", type=int, default=8, help="of a block, at least twice its concurrency"
    )
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--rounds", type=int, default=50, help="per concurrency, at most")
    parser.add_argument("--seconds", type=float, default=420, help="of the run, starts included")
    parser.add_argument("--start-seconds", type=float, default=240, help="of the starts, at most")
    parser.add_argument("--pictures", type=int, default=10_000, help="made while the servers start")
    parser.add_argument(
        "--server-options", type=shlex.split, default=[], help="more options of vllm serve"
    )
    parser.add_argument("--eager", action="store_true", help="no compilation, no CUDA graphs")
    parser.add_argument("--pin", action="store_true", help="give each server cores of its own")
    parser.add_argument("--trace", type=Path, help="folder for one profile of each kind of server")
    parser.add_argument("--logs", type=Path, help="folder that keeps the servers' logs")
    parser.add_argument("--commit", default="", help="of the plugin, for the report")
    parser.add_argument("--note", default="", help="for the report")
    parser.add_argument("--resume", action="store_true", help="add to the results in --out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    return parser.parse_args(argv)
