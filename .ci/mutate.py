#!/usr/bin/env python3
"""Do the fast tests notice when code is wrong? One small fault at a time, in a copy of the tree.

    python .ci/mutate.py --seed 0 --mutants 200

draws that many mutants of engine/ and server/ (and a quarter of it of compat/, reported apart),
runs the fast unit tests against each, the slow ones against those that live, and the few engine
tests against those that still do. It prints each verdict, the survivors and the shares killed.
`--named` runs the faults of mutants.toml instead, which once went unnoticed and may not again.

The operators are mutmut's; its own runner is not used, for it leaves decorated functions out, and
engines in other processes. Here a process that has imported vLLM and torch is forked for every
mutant, which takes as long as the tests do. Not mutated is what no test can see: messages to the
log, types, `__all__`; and a string is changed once, not in its case too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from mutants import ROOT, Mutant, drawn, named

ROOMS = ("engine", "server")
APART = ("compat",)
UNIT_TESTS = (
    "tests/engine",  # those that start no engine
    "tests/server",
    "tests/methods/test_tower.py",  # the attention hook, from hidden states
    "tests/compat/test_surfaces.py",
)
# Real engines, for what no unit test can see: outputs, caches, and HTTP.
ENGINE_TESTS = (
    "tests/engine/test_offline.py::test_caches_never_mix_budgets_questions_or_methods",
    "tests/engine/test_reuse.py::test_interleaved_requests_are_answered_as_without_caches",
    "tests/server/test_main.py::test_a_budget_per_request",
)
OURS = ("fsr_vllm", "tests", "benchmarks", "conftest")
LEAST_PATIENCE = 60.0  # seconds that the unit tests may take at least
ENGINE_PATIENCE = 900.0
SLOW = 3.0  # seconds from which on a unit test waits for what the fast ones let live
PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "-m", "not engine and not full")


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant."""

    room: str
    place: str
    change: str
    outcome: str  # killed: by tests; engine: by engine tests only; survived


def copy_of_the_tree(folder: Path) -> Path:
    """The files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def import_what_tests_import(tree: Path, tests: Sequence[str]) -> None:
    """Everything but our own modules, so that a fork need not: vLLM alone takes seconds."""
    code = (
        "import sys, pytest\n"
        f"pytest.main(['--collect-only', '-q', *{[*PYTEST, *tests]!r}])\n"
        "print('MODULES', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    for name in done.stdout.rpartition("MODULES")[2].split():
        if name.split(".")[0] not in (*OURS, "test", "__main__"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    early = sorted(name for name in sys.modules if name.split(".")[0] == "fsr_vllm")
    assert not early, f"imported before the fork: {early}"


class Stopwatch:
    """A pytest plugin: which tests are slow, as arguments that leave them out."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.slow: dict[str, None] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A slow call is one test's; a slow preparation serves the whole file."""
        if report.duration > SLOW:
            name = report.nodeid if report.when == "call" else report.nodeid.split("::")[0]
            self.slow[name] = None

    def pytest_sessionfinish(self) -> None:
        """Write them down."""
        self.file.write_text(json.dumps(list(self.slow)))


def forked(
    tree: Path, tests: Sequence[str], patience: float, log: Path, plugins: Sequence[object] = ()
) -> bool:
    """Whether the tests pass in a fork of this process; no if they take longer than `patience`."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.setsid()
            os.chdir(tree)
            with log.open("w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            sys.path.insert(0, str(tree))
            status = int(pytest.main([*PYTEST, *tests], plugins=plugins))
        finally:
            os._exit(status)
    ends = time.monotonic() + patience
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def apart(tree: Path, tests: Sequence[str], log: Path) -> bool:
    """Whether the engine tests pass, in a process of their own."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", *PYTEST[:-2], "-m", "not full", *tests]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            return process.wait(ENGINE_PATIENCE) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False


def judge(
    mutants: Sequence[Mutant],
    tree: Path,
    fast: Sequence[str],
    slow: Sequence[str],
    engine: Sequence[str],
    patience: float,
) -> Iterator[Verdict]:
    """Each mutant's fate in `tree`."""
    for mutant in mutants:
        path, log = tree / mutant.file, tree.parent / f"{tree.name}.log"
        original = path.read_text()
        path.write_text(mutant.code)
        try:
            lives = forked(tree, fast, patience, log)
            if lives and slow:
                lives = forked(tree, slow, ENGINE_PATIENCE, log)
            if not lives:
                outcome = "killed"
            elif engine and not apart(tree, engine, log):
                outcome = "engine"
            else:
                outcome = "survived"
        finally:
            path.write_text(original)
        yield Verdict(mutant.room, mutant.file, mutant.change, outcome)


def share_out(mutants: Sequence[Mutant], args: argparse.Namespace, folder: Path) -> list[Verdict]:
    """All verdicts, from `--jobs` processes with a tree each."""
    tree = copy_of_the_tree(folder / "tree-0")
    import_what_tests_import(tree, args.tests)
    log, times = folder / "unmutated.log", folder / "slow.json"
    if not forked(tree, args.tests, 1800, log, [Stopwatch(times)]):
        raise SystemExit(f"the tests fail without a mutant:\n{log.read_text()[-3000:]}")
    slow: list[str] = json.loads(times.read_text())
    fast = [*args.tests, *(f"--deselect={name}" for name in slow)]
    started = time.monotonic()
    if not forked(tree, fast, 1800, log):
        raise SystemExit(f"the fast tests fail without a mutant:\n{log.read_text()[-3000:]}")
    seconds = time.monotonic() - started
    print(f"{seconds:.1f} s for the fast unit tests; slow: {', '.join(slow) or 'none'}", flush=True)
    workers = []
    for job in range(args.jobs):
        place = tree if job == 0 else copy_of_the_tree(folder / f"tree-{job}")
        worker = os.fork()
        if worker == 0:
            try:
                with (folder / f"{job}.jsonl").open("w") as out:
                    mine, patience = mutants[job :: args.jobs], max(LEAST_PATIENCE, 5 * seconds)
                    fates = judge(mine, place, fast, slow, args.engine_tests, patience)
                    for verdict in fates:
                        out.write(json.dumps(asdict(verdict)) + "\n")
                        out.flush()
                        print(f"{verdict.outcome:<9}{verdict.place}: {verdict.change}", flush=True)
            finally:
                os._exit(0)
        workers.append(worker)
    for worker in workers:
        os.waitpid(worker, 0)
    lines = [
        line
        for job in range(args.jobs)
        for line in (folder / f"{job}.jsonl").read_text().split("\n")
    ]
    return [Verdict(**json.loads(line)) for line in lines if line]


def report(verdicts: Sequence[Verdict], rooms: Sequence[str]) -> None:
    """Survivors, then the share killed."""
    mine = [verdict for verdict in verdicts if verdict.room in rooms]
    for verdict in mine:
        if verdict.outcome == "survived":
            print(f"survived  {verdict.place}: {verdict.change}")
    unit, engine = (sum(v.outcome == word for v in mine) for word in ("killed", "engine"))
    share = 100 * (unit + engine) / max(1, len(mine))
    print(
        f"== {', '.join(rooms)}: {unit + engine} of {len(mine)} killed ({share:.0f} %), "
        f"{unit} by unit tests, {engine} by engine tests only\n"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutants", type=int, default=200)
    parser.add_argument("--compat", type=int, help="mutants of compat/; default: a quarter")
    parser.add_argument("--named", action="store_true", help="the faults of .ci/mutants.toml")
    parser.add_argument("--tests", nargs="+", default=list(UNIT_TESTS))
    parser.add_argument("--engine-tests", nargs="*", default=list(ENGINE_TESTS), help="none: skip")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    sys.dont_write_bytecode = True
    if args.named:
        mutants = named(ROOT / ".ci" / "mutants.toml")
    else:
        count = args.mutants // 4 if args.compat is None else args.compat
        mutants = drawn(ROOMS, args.mutants, args.seed)
        mutants += drawn(APART, count, args.seed) if count else []
    with tempfile.TemporaryDirectory(prefix="fsr-mutants-") as folder:
        verdicts = share_out(mutants, args, Path(folder))
    print()
    others = tuple(sorted({verdict.room for verdict in verdicts} - {*ROOMS, *APART}))
    for rooms in (ROOMS, APART, others):
        if any(verdict.room in rooms for verdict in verdicts):
            report(verdicts, rooms)


if __name__ == "__main__":
    main()
