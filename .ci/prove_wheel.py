"""Proves the wheel and the sdist in a folder (`make dist`): complete, importable, commands present.

The wheel goes into a fresh environment by `pip install --no-deps`; vLLM, torch and the other
dependencies are read from the environment that runs this script, as they would be on a machine that
has them already.
"""

import json
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# What the wheel exists for, beside its modules: types, and what the demo shows and serves.
SHIPPED = (
    "py.typed",
    "demo/pictures/scenes.json",
    "demo/pictures/photographs.json",
    "demo/weights/config.json",
    "demo/weights/model.safetensors",
    "demo/weights/text_encoder/model.safetensors",
)
# What belongs to the repository alone: the testbed draws, trains and evaluates; it needs packages
# that a server does not.
FOREIGN = ("benchmarks", "testbed", "tests", "train.py", "scenes.py", "evaluate.py")

# Runs inside the fresh environment: loads each entry point that pyproject.toml declares, and what
# the demo asks, from the installed wheel, without the packages that its pictures were drawn with.
INSIDE = """
import json, sys
for name in ("skimage", "sklearn", "benchmarks"):
    sys.modules[name] = None
from importlib.metadata import distribution
import fsr_vllm
home, version, declared = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
assert fsr_vllm.__file__.startswith(home), f"imported {fsr_vllm.__file__}, not the wheel in {home}"
assert fsr_vllm.__version__ == version == distribution("fsr-vllm").version, "versions differ"
found = {(e.group, e.name): e for e in distribution("fsr-vllm").entry_points}
for group, name, target in declared:
    assert found[group, name].value == target, (group, name)
    assert callable(found[group, name].load()), f"{target} is not callable"
from fsr_vllm.demo import command, demo_model, photographs, scenes
assert callable(command.run) and (demo_model() / "config.json").exists()
for asked in (scenes(), photographs()):
    assert asked and all(one.picture.startswith("data:image/") for one in asked), "no demo pictures"
"""


def main(folder: Path) -> None:
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    version = wheel.name.split("-")[1]
    check_contents(wheel, sdist)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch).resolve() / "venv"
        venv.create(home, with_pip=True, symlinks=True)
        python = str(home / "bin" / "python")
        pip = (python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
        run(*pip, str(wheel.resolve()), cwd=scratch)
        # From here on the other packages are visible, after the environment's own, and with their
        # .pth files.
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(run(python, "-c", where, cwd=scratch).strip())
        (site / "dependencies.pth").write_text(
            f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        )
        run(python, "-c", INSIDE, str(home), version, json.dumps(entry_points()), cwd=scratch)
        for script in PROJECT["scripts"]:
            usage = run(str(home / "bin" / script), "--help", cwd=scratch)
            assert script in usage, (
                f"`{script} --help` does not show how to use it: {usage[:200]!r}"
            )
    print(
        f"dist: {wheel.name} ({wheel.stat().st_size / 1024:.0f} KiB) and {sdist.name}: "
        "proven in a fresh environment"
    )


def check_contents(wheel: Path, sdist: Path) -> None:
    """Every file of the package is in both archives, and the wheel holds nothing else."""
    files = {str(p.relative_to(ROOT)) for p in (ROOT / "fsr_vllm").rglob("*") if p.is_file()}
    files = {
        name
        for name in files
        if "__pycache__" not in name and not name.endswith((".pyc", ".swp", "~"))
    }
    absent = {f"fsr_vllm/{name}" for name in SHIPPED} - files
    assert not absent, f"the package lacks {sorted(absent)}"
    with zipfile.ZipFile(wheel) as archive:
        packed = {
            name
            for name in archive.namelist()
            if ".dist-info/" not in name and not name.endswith("/")
        }
        extra = {
            name.split(".dist-info/", 1)[1] for name in archive.namelist() if ".dist-info/" in name
        }
    foreign = sorted(name for name in packed if set(name.split("/")) & set(FOREIGN))
    assert not foreign, f"the wheel has {foreign}"
    assert packed == files, (
        f"wheel lacks {sorted(files - packed)}, has besides {sorted(packed - files)}"
    )
    assert "licenses/LICENSE" in extra, "the wheel has no license"
    with tarfile.open(sdist) as archive:
        sources = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    missing = (files | {"pyproject.toml", "README.md", "LICENSE"}) - sources
    assert not missing, f"sdist lacks {sorted(missing)}"


def entry_points() -> list[tuple[str, str, str]]:
    groups = {"console_scripts": PROJECT["scripts"], **PROJECT["entry-points"]}
    return [
        (group, name, target)
        for group, entries in groups.items()
        for name, target in entries.items()
    ]


def run(*command: str, cwd: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"dist: {' '.join(command)[:200]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
