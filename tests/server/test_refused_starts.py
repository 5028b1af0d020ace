"""Starts of a server that must fail, with the words that a user needs to see."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fsr_vllm.demo import ENVIRONMENT

pytestmark = pytest.mark.engine

# Options, environment and words of each.
REFUSED_STARTS = {
    "unknown plugin": (("--plugin", "nosuch"), {}, ["nosuch", "installed: fsr"]),
    "grpc": (("--plugin", "fsr", "--grpc"), {}, ["--grpc", "fsr"]),
    "rust": (("--plugin", "fsr"), {"VLLM_USE_RUST_FRONTEND": "1"}, ["Rust", "fsr"]),
    "option without plugin": (("--fsr-budget", "64"), {}, ["--fsr-budget", "--plugin fsr"]),
    "bad budget": (("--plugin", "fsr", "--fsr-budget", "1.5"), {}, ["--fsr-budget", "off"]),
    "adaptive without bounds": (
        ("--plugin", "fsr", "--fsr-adaptive"),
        {},
        ["--fsr-adaptive", "LOW:HIGH", "bounds"],
    ),
    "adaptive over maximum": (
        ("--plugin", "fsr", "--fsr-adaptive", "64:288", "--fsr-max-budget", "100"),
        {},
        ["error: --fsr-adaptive 288, above --fsr-max-budget 100"],
    ),
    "budget over maximum": (
        ("--plugin", "fsr", "--fsr-budget", "200", "--fsr-max-budget", "100"),
        {},
        ["error: --fsr-budget 200, above --fsr-max-budget 100"],
    ),
    "default share over maximum": (
        ("--plugin", "fsr", "--fsr-budget", "0.5", "--fsr-max-budget", "100"),
        {},
        ["fsr.budget 0.5 of 576 = 288, above fsr.max_budget 100"],
    ),
    "default method without its input": (
        ("--plugin", "fsr", "--fsr-method", "cdpruner", "--fsr-text-encoder", "none"),
        {},
        ["defaults would fail", "relevance"],
    ),
    "unknown method": (
        ("--plugin", "fsr", "--fsr-method", "nope"),
        {},
        ["error: argument --fsr-method: must be one of fsr", "random"],
    ),
    "no text encoder": (
        ("--plugin", "fsr", "--fsr-text-encoder", "nowhere/at-all"),
        {},
        ["nowhere/at-all", "--fsr-text-encoder llm", "--fsr-text-encoder none"],
    ),
    "unknown setting": (
        ("--plugin", "fsr", "--additional-config", '{"fsr": {"bugdet": 3}}'),
        {},
        ["bugdet", "max_budget"],
    ),
}


@pytest.fixture(scope="module")
def refused_starts(checkpoint):
    """What each of these starts printed before it gave up; two run at a time."""

    def start(name):
        options, environment, _ = REFUSED_STARTS[name]
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            str(checkpoint),
            *options,
        ]
        environment = {**os.environ, **ENVIRONMENT, **environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)

    with ThreadPoolExecutor(2) as pool:
        yield dict(zip(REFUSED_STARTS, pool.map(start, REFUSED_STARTS), strict=True))


@pytest.mark.parametrize("name", REFUSED_STARTS)
def test_start_is_refused(refused_starts, name):
    done = refused_starts[name]
    output = done.stdout + done.stderr
    assert done.returncode != 0
    for word in REFUSED_STARTS[name][2]:
        assert word in output, output[-2000:]
