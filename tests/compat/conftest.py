"""Shared by the tests of what is replaced in vLLM."""

import pytest

from fsr_vllm import plugin
from fsr_vllm.compat.patching import undo_all


@pytest.fixture
def untouched():
    """vLLM as it is, whatever earlier tests of this process have replaced."""
    undo_all()
    yield
    undo_all()
    plugin.register()
