"""The set-up script: what it installs by hand, how it looks for PyTorch's index, what it says when
it gives up.
"""

import importlib.util
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "cpu_env.py"
HOOK = ROOT / ".ci" / "torchvision_cpu_ops.py"


@pytest.fixture
def cpu_env(tmp_path, monkeypatch) -> ModuleType:
    """The script as a module, looking at an empty environment; pip is this environment's and
    installs into a folder.
    """
    spec = importlib.util.spec_from_file_location("cpu_env", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    target = tmp_path / "lib" / "python3" / "site-packages"
    monkeypatch.setattr(module, "VENV", tmp_path)
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    monkeypatch.setenv("PIP_TARGET", str(target))
    return module


def site(module: ModuleType) -> Path:
    return module.VENV / "lib" / "python3" / "site-packages"


def test_a_stand_in_is_a_distribution_pip_accepts(cpu_env):
    cpu_env.stand_in(
        "some-name", "1.2.3+cpu", requires="other==1", files={"some_file.py": "x = 1\n"}
    )
    assert cpu_env.installed("some-name") == "1.2.3+cpu"
    assert (site(cpu_env) / "some_file.py").read_text() == "x = 1\n"
    code = "from importlib.metadata import distribution as d; o = d('some-name'); "
    code += "print(o.version, o.requires)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=site(cpu_env), capture_output=True, text=True
    )
    assert done.stdout.strip() == "1.2.3+cpu ['other==1']", done.stderr


def test_a_stand_in_that_is_there_is_left_alone(cpu_env, monkeypatch):
    cpu_env.stand_in("some-name", "1")
    monkeypatch.setattr(cpu_env, "pip", lambda *_: pytest.fail("pip was called"))
    cpu_env.stand_in("some-name", "1")


def test_an_index_that_stays_silent_costs_only_the_probe(cpu_env, monkeypatch):
    monkeypatch.setattr(cpu_env, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        assert not cpu_env.answers(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - start < 2


def test_an_index_that_is_not_there_is_not_used(cpu_env):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert not cpu_env.answers(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(("reachable", "expected"), [(True, ["index"]), (False, ["plain"])])
def test_the_index_is_used_where_it_answers(cpu_env, monkeypatch, reachable, expected):
    calls = []
    monkeypatch.setattr(cpu_env, "TORCH_INDEX", "https://index.example")
    monkeypatch.setattr(cpu_env, "answers", lambda url: reachable)
    monkeypatch.setattr(cpu_env, "pip", lambda *a, check=True: calls.append(a) or 0)
    cpu_env.install_cpu_torch()
    assert ["index" if "--extra-index-url" in call else "plain" for call in calls] == expected
    assert all(f"torch=={cpu_env.TORCH}" in call for call in calls), (
        "the CPU build by its full version, always"
    )


def test_without_a_cpu_torch_the_error_names_the_ways_out(cpu_env, monkeypatch):
    monkeypatch.setattr(cpu_env, "TORCH_INDEX", "")
    monkeypatch.setattr(cpu_env, "pip", lambda *_, check=True: 1)
    with pytest.raises(SystemExit) as error:
        cpu_env.install_cpu_torch()
    for way in ("FSR_TORCH_INDEX", "PIP_FIND_LINKS", "PYTHON="):
        assert way in str(error.value)


def test_an_unknown_kind_of_machine_is_refused(monkeypatch, cpu_env):
    monkeypatch.setenv("FSR_ENV", "tpu")
    with pytest.raises(SystemExit, match="cpu, cuda"):
        cpu_env.main()


def run_with_fakes(folder: Path, code: str) -> str:
    """Run `code` where torch and torchvision are fakes; the fake torchvision wants its operators
    declared.
    """
    for name, text in {
        "torch": "declared = []\nfrom . import library, version\n",
        "torch/version": "cuda = None\n",
        "torch/library": """
            import torch
            class Library:
                def __init__(self, name, kind): self.name = name
                def define(self, schema):
                    torch.declared.append(f"{self.name}::{schema.split('(')[0]}")
            """,
        "torchvision": "import torch\nfrom torchvision import part\nfound = list(torch.declared)\n",
        "torchvision/part": "",
    }.items():
        path = folder / f"{name}.py" if "/" in name else folder / name / "__init__.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    (folder / HOOK.name).write_text(HOOK.read_text())
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        f"import {HOOK.stem}\n{textwrap.dedent(code)}"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_hook_declares_the_operators_before_torchvision_runs(tmp_path):
    code = "import torchvision; print(*torchvision.found)"
    assert run_with_fakes(tmp_path, code) == "torchvision::nms torchvision::qnms"


def test_the_hook_does_nothing_until_torchvision_is_imported(tmp_path):
    code = """
        import json
        from importlib.util import find_spec
        nothing = find_spec("nothing_of_this_name")
        print(find_spec("torchvision") is not None, "torch" in sys.modules, nothing)
        """
    assert run_with_fakes(tmp_path, code) == "True False None"


def test_the_hook_leaves_a_cuda_torch_alone(tmp_path):
    code = "import torch; torch.version.cuda = '13.0'; import torchvision; print(torchvision.found)"
    assert run_with_fakes(tmp_path, code) == "[]"
