"""What the demo asks: questions about pictures that are files of the package.

`python -m benchmarks.testbed.prerender` writes the files; nothing is drawn here, so that the demo
needs neither the testbed nor the packages that its pictures come from.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import NamedTuple

PICTURES = Path(__file__).parent / "pictures"
_TYPES = {".png": "image/png", ".jpg": "image/jpeg"}


class Asked(NamedTuple):
    """One question of the demo."""

    picture: str  # data: URL
    question: str
    expected: str | None  # the right answer, where it is known
    family: str


def scenes() -> list[Asked]:
    """Questions of every family about scenes that the bundled model never saw."""
    return _read("scenes.json")


def photographs() -> list[Asked]:
    """Open questions about photographs, for a model that knows the world."""
    return _read("photographs.json")


def _read(name: str) -> list[Asked]:
    records = json.loads((PICTURES / name).read_text())
    return [
        Asked(_data_url(record["picture"]), record["question"], record["answer"], record["family"])
        for record in records
    ]


def _data_url(name: str) -> str:
    path = PICTURES / name
    content = base64.b64encode(path.read_bytes()).decode()
    return f"data:{_TYPES[path.suffix]};base64,{content}"
