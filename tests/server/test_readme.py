"""README.md as a newcomer uses it: its server with its options, and its requests pasted as they
stand.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fsr_vllm.demo import ENVIRONMENT, demo_model, serve

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SECTION = README.partition("## First request\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
ADDRESS = "http://localhost:8000"
RUN = {
    "bash": ["bash", "-eu", "-c"],
    "python": [sys.executable, "-c"],
    "js": ["node", "--input-type=module", "--eval"],
}

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The server of the first block, at a port of its own."""
    language, text = BLOCKS[0]
    command = shlex.split(text.replace("\\\n", " "))
    assert language == "bash"
    assert command[:3] == ["vllm", "serve", "$(fsr-vllm demo-model)"]
    log = tmp_path_factory.mktemp("readme") / "server.log"
    with serve(str(demo_model()), log, command[3:], ENVIRONMENT) as url:
        yield url.removesuffix("/v1")
        assert (
            "Traceback" not in log.read_text()
        )  # before it is stopped, which vLLM may complain about


def test_the_requests_are_in_three_languages():
    assert [language for language, _ in BLOCKS[1:]] == list(RUN)
    assert all(ADDRESS in text for _, text in BLOCKS[1:])


@pytest.mark.parametrize(
    ("language", "text"), BLOCKS[1:], ids=[language for language, _ in BLOCKS[1:]]
)
def test_a_block_prints_what_is_written_under_it(address, language, text):
    if shutil.which(RUN[language][0]) is None:
        pytest.skip(f"no {RUN[language][0]} here")
    expected = re.findall(r"^(?:#|//) (.*)$", text, re.MULTILINE)
    command = [*RUN[language], text.replace(ADDRESS, address)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert any("32/144" in line for line in expected)
    said = " ".join(done.stdout.split())  # this model's answers begin with a space
    for line in expected:
        assert line in said, done.stdout
