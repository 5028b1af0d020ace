"""`fsr-vllm methods`: all of them in a table, one with its details, or either as JSON."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fsr_vllm.methods import MethodInfo

WIDTH = 100  # columns; fewer on a narrower terminal


def add_parser(commands: Any) -> None:
    """The subcommand, beside those of cli.py."""
    parser = commands.add_parser("methods", help="list the pruning methods, or tell all about one")
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a method: its options, inputs and source"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what is asked for; 2 and a message for a name that is no method's."""
    from fsr_vllm.methods import list_methods
    from fsr_vllm.params import did_you_mean

    known = list_methods()
    if args.name is not None and args.name not in known:
        hint = did_you_mean(args.name, known) or f"; there are {', '.join(known)}"
        print(f"fsr-vllm methods: unknown method {args.name!r}{hint}", file=sys.stderr)
        return 2
    if args.json:
        print(
            json.dumps(
                asdict(known[args.name])
                if args.name
                else [asdict(info) for info in known.values()],
                indent=2,
            )
        )
    elif args.name:
        _print_one(known[args.name])
    else:
        _print_all(list(known.values()))
    return 0


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    return console


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _print_all(known: list[MethodInfo]) -> None:
    table = _table("method", "served?", "question?", "fidelity", "arXiv", "needs (uses)")
    for info in known:
        needs = ", ".join(info.needs) or "-"
        uses = f" ({', '.join(info.uses)})" if info.uses else ""
        paper = re.search(r"\d{4}\.\d{5}", info.paper)
        row = (
            info.name,
            _yes(info.servable),
            _yes(info.query_aware),
            info.fidelity,
            paper[0] if paper else "-",
        )
        table.add_row(*row, needs + uses)
    console = _console()
    console.print(table)
    console.print(
        "served?: whether a request may name it; the others run through fsr_vllm.prune(), given their inputs. "
        "question?: whether the question can change what is kept. More about one: fsr-vllm methods NAME.",
        markup=False,
    )


def _print_one(info: MethodInfo) -> None:
    console = _console()
    facts = _table("", "")
    facts.show_header = False
    needs = ", ".join(info.needs) or "nothing but features"
    for key, value in [
        ("paper", info.paper or "none"),
        ("license of its code", info.license),
        ("fidelity", info.fidelity),
        ("needs", needs),
        ("uses, where given", ", ".join(info.uses) or "nothing else"),
        ("depends on the question", _yes(info.query_aware)),
        ("a request may name it", _yes(info.servable)),
    ]:
        facts.add_row(key, value)
    console.print(f"{info.name}: {info.summary}", markup=False)
    console.print(facts)
    if not info.options:
        console.print("No options.")
        return
    options = _table("option", "default", "in requests", "meaning")
    for name, default in info.options.items():
        options.add_row(
            name, json.dumps(default), info.option_bounds.get(name, "any"), info.option_docs[name]
        )
    console.print(options)
