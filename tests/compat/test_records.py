"""The records of what the package uses of vLLM hold for the installed one, and nothing is used
without a record.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fsr_vllm
from fsr_vllm import params
from fsr_vllm.compat.attributes import ATTRIBUTES, SETTINGS_KEY
from fsr_vllm.compat.patching import Patch, all_entries
from fsr_vllm.compat.version import vllm_version
from fsr_vllm.engine import wire

PACKAGE = Path(fsr_vllm.__file__).parent
ROOT = PACKAGE.parent
ENTRIES = [entry for entries in all_entries().values() for entry in entries]
# In a complete installation of this release; others are missing for their stated reason.
NOT_HERE = {
    "CohereServingChatV2.create_chat_v2",  # the package cohere
    "serve_grpc",  # the package grpcio
    "BaseDummyInputsBuilder.get_dummy_processor_inputs",  # until 0.30
}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.target.partition(":")[2])
def test_every_name_is_there_as_stated(entry):
    found = entry.find()
    if found is None:
        assert entry.missing
        assert entry.target.partition(":")[2] in NOT_HERE
        return
    assert entry.mismatch(found) is None


def test_every_record_says_what_it_must():
    targets = [entry.target for entry in ENTRIES]
    assert len(set(targets)) == len(targets)
    for entry in ENTRIES:
        assert entry.why.endswith(".")
        assert entry.until
        assert not entry.until.endswith(".")
        assert entry.link.startswith("https://github.com/vllm-project/vllm/") or not entry.link
        if isinstance(entry, Patch) and entry.find() is not None:
            assert entry.signature


def test_the_page_is_made_of_the_records():
    script = ROOT / ".ci" / "compat_page.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def trees(*, compat=True):
    for path in sorted(PACKAGE.rglob("*.py")):
        if compat or path.parent.name != "compat":
            yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


# setattr with a name that is not written out, and on what.
DYNAMIC = {
    "compat/patching.py",  # the way to patch
    "cli_args/__init__.py",  # argparse's namespace
    "methods/options.py",  # a method of ours
    "server/ignored.py",  # vLLM's own carriers of a request
}


def test_attributes_on_vllms_objects_are_the_listed_ones():
    known, found = {each.name for each in ATTRIBUTES}, set()
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
                name = node.args[1]
                if isinstance(name, ast.Constant):
                    found.add((path, name.value))
                else:
                    assert path in DYNAMIC, (path, ast.unparse(node))
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            for target in ast.walk(ast.Tuple(elts=[each for each in targets if each])):
                if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store):
                    of_self = getattr(target.value, "id", "") == "self"
                    if target.attr.startswith("fsr") and not of_self:
                        found.add((path, target.attr))
    assert {each for each in found if each[1] not in known} == set()
    assert found  # so that the search can fail


def test_listed_names_are_those_in_use():
    names = {each.name for each in ATTRIBUTES}
    assert {params.SETTINGS_KEY, params.REQUEST_KEY, wire.PLAN_FIELD} <= names
    assert params.SETTINGS_KEY == SETTINGS_KEY
    for each in ATTRIBUTES:
        assert each.of
        assert each.why.endswith(".")


def test_only_compat_names_private_parts_of_vllm():
    """Subclasses of ours may override single-underscore names of vLLM; calling and patching them is
    for compat alone.
    """
    for path, tree in trees(compat=False):
        modules = {
            node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        } | {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert not [name for name in modules if name.startswith("vllm.v1")], path


def test_the_records_speak_of_this_window():
    """What every release of the window must have was read in the installed one."""
    minor = int(vllm_version().split(".")[1])
    for entry in ENTRIES:
        first, _, last = entry.read.replace("0.", "").partition("-")
        if last and not entry.missing:
            assert int(first) <= minor <= int(last), entry.target
