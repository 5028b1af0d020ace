"""The demo's pictures and questions are what the command that writes them makes of the testbed."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from benchmarks.testbed.prerender import prerender
from fsr_vllm.demo import photographs, scenes
from fsr_vllm.demo.asked import PICTURES


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "old.png").write_bytes(b"")
    prerender(folder)
    return folder


def test_the_command_writes_the_files_of_the_package(written):
    names = {file.name for file in PICTURES.iterdir()} - {"README.md"}
    assert {file.name for file in written.iterdir()} == names
    for name in names:
        if name.endswith(".json"):
            assert (written / name).read_text() == (PICTURES / name).read_text()
            continue
        new, committed = (
            np.asarray(Image.open(place / name), int) for place in (written, PICTURES)
        )
        assert new.shape == committed.shape
        # Another release of Pillow may round a JPEG another way; a PNG it can only pack otherwise.
        assert abs(new - committed).max() <= (0 if name.endswith(".png") else 8), name


def test_the_demo_asks_every_family_in_good_english():
    asked = scenes()
    families = ("attribute", "object", "existence", "digit", "scene", "count", "relation")
    assert [one.family for one in asked] == [family for family in families for _ in range(3)]
    assert any(" an orange " in one.question for one in asked)
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", one.question) for one in asked)
    assert all(one.expected for one in asked)
    assert all(one.picture.startswith("data:image/png;base64,") for one in asked)


def test_photographs_are_asked_about_without_a_known_answer():
    asked = photographs()
    assert [one.expected for one in asked] == [None] * 3
    assert all(one.picture.startswith("data:image/jpeg;base64,") for one in asked)


def test_every_picture_is_asked_about():
    records = [
        record
        for name in ("scenes.json", "photographs.json")
        for record in json.loads((PICTURES / name).read_text())
    ]
    pictures = {file.name for file in PICTURES.iterdir() if file.suffix in (".png", ".jpg")}
    assert {record["picture"] for record in records} == pictures
