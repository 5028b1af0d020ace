"""The demo needs nothing but what vLLM brings: neither the testbed nor what it draws with."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Imports of these fail as they do where the packages are not installed.
WITHOUT = """
import sys
for name in ("skimage", "sklearn", "tqdm", "matplotlib", "benchmarks"):
    sys.modules[name] = None
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code], cwd=ROOT, capture_output=True, text=True
    )


def test_the_demo_asks_without_the_testbed():
    code = """
try:
    import skimage
except ImportError:
    print("without")
from fsr_vllm.demo import demo_model, photographs, scenes
from fsr_vllm.demo.command import ask_all, run
from fsr_vllm.demo.serving import serve
assert (demo_model() / "config.json").exists()
print(len(scenes()), len(photographs()))
"""
    done = run(code)
    assert done.stdout.split() == ["without", "21", "3"], done.stderr
