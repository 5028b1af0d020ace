"""Shared by all tests: the small random checkpoints, built once, and photographs."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """LLaVA-1.5 architecture, 576 visual tokens, random weights, with its text_encoder/."""
    from benchmarks.testbed import build_checkpoint

    return build_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llava")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Callable[[str], Path]:
    """The small random checkpoint of a family of `tests.checkpoints`, by name; built when first
    asked for.
    """
    from tests.checkpoints import build

    folder = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda name: build(name, folder / name))


@pytest.fixture(scope="session")
def pictures() -> dict[str, str]:
    """Real photographs as data URLs, by name."""
    from benchmarks.testbed import data_url, photos

    return {name: data_url(image, size=(400, 300)) for name, image in photos().items()}
