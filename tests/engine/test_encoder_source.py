"""A text encoder by name: the revision that is asked for is the one that every part of it is loaded
from.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fsr_vllm.engine.encoder_source import split_revision

NAME = "someone/clip"
# Run in a process of its own, since the folder of Hugging Face's cache is read once.
SCRIPT = """
import json, sys
from types import SimpleNamespace
from transformers import CLIPConfig, LlavaConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from fsr_vllm.compat.model import weight_source
from fsr_vllm.engine.encoder_source import split_revision
from fsr_vllm.engine.text_encoder import ClipText, find_encoder

model, asked = sys.argv[1], sys.argv[2:]
served = SimpleNamespace(model=model, hf_config=LlavaConfig.from_pretrained(model))
found = {}
for encoder in asked:
    try:
        resolved, sign = find_encoder(served, encoder, "auto")
        tower = ClipText(resolved, sign)
        source = weight_source(*split_revision(resolved), "fsr_text.")
        weights = dict(DefaultModelLoader(LoadConfig())._get_weights_iterator(source))
        mark = float(weights["fsr_text.visual_projection.weight"].flatten()[0])
        found[encoder] = {"resolved": resolved, "mark": mark, "tokenizer": tower._tokenizer.name_or_path}
    except ValueError as error:
        found[encoder] = {"error": str(error)}
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(checkpoint, tmp_path_factory):
    """Two revisions of one encoder in Hugging Face's cache, told apart by one weight; what each
    name came to.
    """
    home = tmp_path_factory.mktemp("hub")
    folder = home / f"models--{NAME.replace('/', '--')}"
    commits = {}
    for number, branch in enumerate(("main", "v1"), start=1):
        commit = commits[branch] = hashlib.sha1(branch.encode()).hexdigest()
        snapshot = folder / "snapshots" / commit
        shutil.copytree(checkpoint / "text_encoder", snapshot)
        weights = load_file(snapshot / "model.safetensors")
        weights["visual_projection.weight"][0, 0] = number
        save_file(weights, snapshot / "model.safetensors", metadata={"format": "pt"})
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / branch).write_text(commit)
    beside = str(checkpoint / "text_encoder")
    asked = [
        NAME,
        f"{NAME}@v1",
        f"{NAME}@{commits['v1']}",
        f"{NAME}@nowhere",
        beside,
        f"{beside}@v1",
    ]
    environment = {**os.environ, "HF_HUB_CACHE": str(home), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", SCRIPT, str(checkpoint), *asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return dict(
        zip(
            ("plain", "branch", "commit", "wrong", "folder", "both"),
            json.loads(line[6:]).values(),
            strict=True,
        )
    ), (
        commits,
        beside,
    )


def test_a_name_becomes_the_commit_that_was_read(found):
    answers, (commits, _) = found
    assert (
        answers["plain"]["resolved"] == f"{NAME}@{commits['main']}"
        and answers["plain"]["mark"] == 1
    )
    for asked in ("branch", "commit"):
        assert (
            answers[asked]["resolved"] == f"{NAME}@{commits['v1']}" and answers[asked]["mark"] == 2
        )


def test_a_folder_has_no_revision(found):
    answers, (_, beside) = found
    assert answers["folder"]["resolved"] == beside
    assert "no revision" in answers["both"]["error"]


def test_a_revision_that_is_not_there_is_refused(found):
    assert (
        f"{NAME}@nowhere" in found[0]["wrong"]["error"]
        and "--fsr-text-encoder" in found[0]["wrong"]["error"]
    )


def test_names(tmp_path):
    assert split_revision("openai/clip") == ("openai/clip", None)
    assert split_revision("openai/clip@v1") == ("openai/clip", "v1")
    odd = tmp_path / "odd@folder"
    odd.mkdir()
    assert split_revision(str(odd)) == (str(odd), None)
