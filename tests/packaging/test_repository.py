"""The files that GitHub, citation tools and pre-commit read: valid, and in step with the rest."""

import importlib.resources
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / ".ci" / "check_version.py"


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def schema(name: str) -> Any:
    folder = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        (".github/workflows/ci.yml", "github-workflows"),
        (".github/workflows/release.yml", "github-workflows"),
        (".github/ISSUE_TEMPLATE/config.yml", "github-issue-config"),
        (".github/ISSUE_TEMPLATE/bug.yml", "github-issue-forms"),
        (".github/ISSUE_TEMPLATE/proposal.yml", "github-issue-forms"),
        ("CITATION.cff", "citation-file-format"),
    ],
)
def test_files_follow_their_schemas(file, kind):
    # YAML 1.1 reads the key `on` as true, and a date as a date: JSON has neither.
    content = json.loads(json.dumps(read(file), default=str).replace('"true": {', '"on": {'))
    jsonschema.validate(content, schema(kind))


def test_every_form_and_workflow_is_checked_above():
    (mark,) = test_files_follow_their_schemas.pytestmark
    checked = {file for file, _ in mark.args[1]}
    found = {str(path.relative_to(ROOT)) for path in (ROOT / ".github").rglob("*.yml")}
    assert found == {file for file in checked if file.startswith(".github")}


def test_the_workflow_runs_what_everybody_runs():
    jobs = read(".github/workflows/ci.yml")["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run"]
    called = (ROOT / ".ci" / "run").read_text()
    assert "for target in setup lint dist test; do" in called


def test_pre_commit_runs_what_lint_runs():
    recipe = re.search(r"^lint: setup\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe
    linted = {
        tuple(line.strip().split("/")[1].split()[:2]) for line in recipe.group(1).splitlines()
    }
    hooks = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    hooked = {tuple(hook["entry"].split("/")[-1].split()[:2]) for hook in hooks}
    assert (
        hooked
        == linted
        == {("ruff", "check"), ("ruff", "format"), ("mypy",), ("lint-imports", "--no-logo")}
    )


def test_the_citation_names_the_paper():
    citation = read("CITATION.cff")
    assert citation["authors"] == [{"name": "The fsr_vllm developers"}]
    (paper,) = citation["references"]
    (identifier,) = paper["identifiers"]
    number = identifier["value"].removeprefix("arXiv:")
    assert number in (ROOT / "README.md").read_text()


def test_exact_versions_are_pinned_where_a_release_could_turn_a_check_red():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for name in ("lint", "mutation", "dist"):
        assert all("==" in requirement for requirement in extras[name]), name


@pytest.fixture
def release(tmp_path):
    """A root of its own with version 1.2.3, and a function that checks a tag there."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "fsr_vllm").mkdir()
    (tmp_path / "fsr_vllm" / "__init__.py").write_text('import torch\n__version__ = "1.2.3"\n')

    def check(tag: str, heading: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n")
        command = [sys.executable, "-S", str(tmp_path / ".ci" / "check_version.py"), tag]
        return subprocess.run(command, capture_output=True, text=True)

    return check


def test_a_tag_is_the_version(release):
    assert release("v1.2.3", "## [1.2.3] - 2026-12-01").returncode == 0


@pytest.mark.parametrize(
    ("tag", "heading", "said"),
    [
        ("v1.2.4", "## [1.2.3] - 2026-12-01", "it should be v1.2.3"),
        ("1.2.3", "## [1.2.3] - 2026-12-01", "it should be v1.2.3"),
        ("v1.2.3", "## [1.2.3] - unreleased", "CHANGELOG.md has no heading"),
        ("v1.2.3", "## [1.2.30] - 2026-12-01", "CHANGELOG.md has no heading"),
    ],
)
def test_another_tag_or_an_open_changelog_is_refused(release, tag, heading, said):
    done = release(tag, heading)
    assert done.returncode == 1 and said in done.stderr


def test_releasing_names_the_command():
    text = (ROOT / "RELEASING.md").read_text()
    assert f"python {CHECK.relative_to(ROOT)} v" in text
    commands = [
        step.get("run", "")
        for step in read(".github/workflows/release.yml")["jobs"]["build"]["steps"]
    ]
    assert 'python .ci/check_version.py "$GITHUB_REF_NAME"' in commands and ".ci/run" in commands


def test_the_named_mutants_are_of_code_that_is_there():
    """One whose text is gone, or stands twice, would let its fault return unnoticed."""
    texts = [path.read_text() for path in (ROOT / "fsr_vllm").rglob("*.py")]
    mutants = tomllib.loads((ROOT / ".ci" / "mutants.toml").read_text())["mutant"]
    found = {each["name"]: sum(text.count(each["old"]) for text in texts) for each in mutants}
    assert len(found) == len(mutants) >= 9
    assert set(found.values()) == {1}, found
