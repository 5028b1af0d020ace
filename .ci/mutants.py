"""Faults for mutate.py: small changes of the package's code, drawn at random or named in a file."""

from __future__ import annotations

import ast
import contextlib
import difflib
import itertools
import random
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
from libcst import matchers
from libcst.metadata import MetadataWrapper
from mutmut.mutation.file_mutation import MutationVisitor
from mutmut.mutation.mutators import mutation_operators, operator_string
from mutmut.mutation.pragma_handling import IgnoredCode

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """One fault: a file of the package with one change."""

    room: str
    file: str  # relative to the root
    change: str  # what differs, to be read
    code: str


class Everywhere(MutationVisitor):
    """Mutmut's visitor, which would pass over decorated functions."""

    def __init__(self) -> None:
        operators = [
            (kind, _once if operator is operator_string else operator)
            for kind, operator in mutation_operators
        ]
        super().__init__(operators, IgnoredCode(set(), set(), set()))

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Call) and matchers.matches(node.func, matchers.Name("cast")):
            return True
        return not isinstance(node, cst.FunctionDef) and super()._skip_node_and_children(node)


def _once(node: cst.BaseString) -> Iterator[cst.BaseString]:
    yield from itertools.islice(operator_string(node), 1)


def drawn(rooms: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """`count` mutants of the rooms, the same for the same seed and code."""
    made = {}
    for room in rooms:
        for path in sorted((ROOT / "fsr_vllm" / room).rglob("*.py")):
            visitor = Everywhere()
            wrapper = MetadataWrapper(cst.parse_module(path.read_text()))
            wrapper.visit(visitor)
            made[path] = (room, wrapper.module, visitor.mutations)
    places = [(path, i) for path, (_, _, all_of) in made.items() for i in range(len(all_of))]
    random.Random(seed).shuffle(places)
    print(f"{len(places)} possible mutants of {', '.join(rooms)}; {count} drawn with seed {seed}")
    found: dict[str, Mutant] = {}
    for path, index in places:
        if len(found) >= count:
            break
        room, module, mutations = made[path]
        mutation = mutations[index]
        code = cst.ensure_type(
            module.deep_replace(mutation.original_node, mutation.mutated_node), cst.Module
        ).code
        line, change = difference(module.code, code)
        if code not in found and line and line not in silent_lines(module.code) and parses(code):
            found[code] = Mutant(room, str(path.relative_to(ROOT)), change, code)
    return list(found.values())


def named(file: Path) -> list[Mutant]:
    """The faults of a TOML file: each replaces a text that stands in the package exactly once."""
    files = {path: path.read_text() for path in sorted((ROOT / "fsr_vllm").rglob("*.py"))}
    found, lost = [], []
    for entry in tomllib.loads(file.read_text())["mutant"]:
        places = [path for path, text in files.items() for _ in range(text.count(entry["old"]))]
        if len(places) != 1:
            lost.append(f"{entry['name']}: {len(places)} places have {entry['old']!r}")
            continue
        (path,) = places
        code = files[path].replace(entry["old"], entry["new"])
        room = path.relative_to(ROOT).parts[1].removesuffix(".py")
        found.append(Mutant(room, str(path.relative_to(ROOT)), entry["name"], code))
    if lost:
        raise SystemExit("\n".join(lost))
    return found


def difference(before: str, after: str) -> tuple[int, str]:
    """The first line that differs, by number (0: none), and how."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    changed = [line for line in lines if not line.startswith(("---", "+++"))]
    if not changed:
        return 0, ""
    number = int(changed[0].split()[1].removeprefix("-").split(",")[0])
    return number, f"line {number}: " + " ".join(line.strip() for line in changed[1:])


def silent_lines(code: str) -> set[int]:
    """Lines of statements that log, or that only a type checker or an import of * reads."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(code)):
        text = ast.unparse(node) if isinstance(node, ast.Expr | ast.If | ast.Assign) else ""
        silent = ("logger.", "logger = ", "if TYPE_CHECKING:", "__all__ = ")
        if isinstance(node, ast.stmt) and text.startswith(silent):
            found.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def parses(code: str) -> bool:
    """Whether it is Python at all."""
    with contextlib.suppress(SyntaxError):
        compile(code, "mutant", "exec")
        return True
    return False
