"""pyproject.toml and the repository: one source for each fact, entry points that exist, nothing
private.
"""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def project_files() -> list[Path]:
    """What git tracks or would track; in an unpacked sdist, where there is no git, nothing can be
    said.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def text_of(path: Path) -> str:
    raw = path.read_bytes()
    return "" if b"\0" in raw[:8192] else raw.decode("utf-8", "replace")


def vllm_window() -> Requirement:
    (found,) = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "vllm"]
    return found


def names_in(module: str) -> set[str]:
    """Names that a module of the package defines or imports at its top level."""
    base = ROOT / module.replace(".", "/")
    source = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    names: set[str] = set()
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return names


def test_entry_points_are_declared_and_exist():
    assert PROJECT["entry-points"] == {
        "vllm.general_plugins": {"fsr": "fsr_vllm.plugin:register"},
        "vllm.endpoint_plugins": {"fsr": "fsr_vllm.server:FsrEndpointPlugin"},
    }
    assert PROJECT["scripts"] == {"fsr-vllm": "fsr_vllm.cli:main"}
    for entries in (*PROJECT["entry-points"].values(), PROJECT["scripts"]):
        for target in entries.values():
            module, name = target.split(":")
            assert name in names_in(module), target


def test_the_version_has_one_source():
    assert "version" not in PROJECT and "version" in PROJECT["dynamic"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fsr_vllm.__version__"}
    tree = ast.parse((ROOT / "fsr_vllm" / "__init__.py").read_text())
    values = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        if [target.id for target in node.targets if isinstance(target, ast.Name)] == ["__version__"]
    ]
    assert len(values) == 1, "fsr_vllm/__init__.py states __version__ as a plain string, once"
    version = Version(str(values[0]))
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    # A second copy of the number is only where a tool cannot read ours: the names of the image.
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    for name in ("docker/Dockerfile", "docker/compose.yaml", "deploy/kubernetes/deployment.yaml"):
        named = re.findall(r"fsr-vllm:(\d[\w.]*)", (ROOT / name).read_text())
        assert set(named) == {str(version)}, name
    assert f'newTag: "{version}"' in (ROOT / "deploy/kubernetes/kustomization.yaml").read_text()


def test_the_vllm_window_has_one_source_and_a_cpu_build_is_in_it():
    window = vllm_window().specifier
    assert (
        window.contains("0.32.0+cpu")
        and window.contains("0.26.0")
        and not window.contains("0.34.0")
    )
    bounds = re.compile(r"vllm\s*[><=~!]=?\s*\d[^\"'`\s]*,\s*[<>]\s*=?\s*\d")
    for path in project_files():
        if path.name != "pyproject.toml":
            assert not bounds.search(text_of(path)), (
                f"{path.relative_to(ROOT)} states the window again"
            )


def test_the_versions_of_the_set_up_are_inside_the_window():
    source = (ROOT / ".ci" / "cpu_env.py").read_text()
    (version,) = re.findall(r'^VLLM = "(.+)"$', source, re.M)
    assert vllm_window().specifier.contains(version)
    (extras,) = re.findall(r'^EXTRAS = "(.+)"$', source, re.M)
    assert set(extras.split(",")) == set(PROJECT["optional-dependencies"])


DISTRIBUTIONS = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "yaml": "pyyaml",
}


def imported(folder: str) -> set[str]:
    """The distributions that the folder's modules import, wherever in a module."""
    found: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module))
    names = {name.partition(".")[0] for name in found} - {"fsr_vllm", "benchmarks"}
    return {DISTRIBUTIONS.get(name, name) for name in names - sys.stdlib_module_names}


def test_what_is_imported_is_declared_and_the_other_way_round():
    declared = {Requirement(text).name for text in PROJECT["dependencies"]}
    # torch brings Triton where there is a GPU; uvicorn runs our routes, and is vLLM's to start.
    assert imported("fsr_vllm") - {"triton"} == declared - {"uvicorn"}
    extra = {Requirement(text).name for text in PROJECT["optional-dependencies"]["bench"]}
    assert imported("benchmarks") - declared <= extra


def test_licence_and_types_are_shipped():
    assert PROJECT["license"] == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert (ROOT / "fsr_vllm" / "py.typed").exists()


# Directories that mean something on any machine: in containers, and examples.
PUBLIC = ("/root/.cache", "/home/vllm", "/opt/fsr-vllm", "/home/user", "/opt/venv")
PRIVATE = re.compile(r"(?<![\w./~$}>-])/(?:home|root|Users|work|opt|mnt|srv|media)(?:/[\w.-]+)+")


def test_no_file_names_a_directory_of_somebodys_machine():
    found = []
    for path in project_files():
        for number, line in enumerate(text_of(path).splitlines(), 1):
            for match in PRIVATE.finditer(line):
                if not match.group().startswith(PUBLIC):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found, "\n".join(found)


def test_the_readme_names_the_combination_that_the_set_up_installs():
    source, readme = (ROOT / ".ci" / "cpu_env.py").read_text(), (ROOT / "README.md").read_text()
    versions = dict(re.findall(r'^(VLLM|TORCH) = "(.+)"$', source, re.M))
    assert f"the CPU build of vLLM {versions['VLLM']}, torch {versions['TORCH']}" in readme
    assert f"`pip install . vllm=={versions['VLLM']}`" in readme
    (low, high) = re.findall(r"installed already, (0\.\d+) to (0\.\d+)", readme)[0]
    window = vllm_window().specifier
    assert window.contains(f"{low}.0") and window.contains(f"{high}.0")
    after, before = (f"0.{int(v.split('.')[1]) + step}.0" for v, step in ((high, 1), (low, -1)))
    assert not window.contains(after) and not window.contains(before)
