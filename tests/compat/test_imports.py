"""Fails when something the package imports of vLLM, private or not, is no longer where it was."""

import ast
import importlib
from pathlib import Path

import pytest

import fsr_vllm

IMPORTED = sorted(
    {
        (node.module, alias.name)
        for file in Path(fsr_vllm.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }
)


@pytest.mark.parametrize(("module", "name"), IMPORTED, ids=lambda value: value)
def test_what_the_package_imports_of_vllm_is_there(module, name):
    found = importlib.import_module(module)
    assert hasattr(found, name) or importlib.import_module(f"{module}.{name}")
