"""Write the demo's pictures and questions: `python -m benchmarks.testbed.prerender`.

They are files of the package. Scenes are held-out ones of the testbed, for each family of questions
the first that something can be asked about; photographs are scikit-image's, for models that know
the world. To be run again when scenes or questions change.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.records import write_json
from fsr_vllm.demo.asked import PICTURES

from .photos import photos
from .questions import FAMILIES, ask, good_english
from .scenes import render, scene

SCENES = 3  # of every family
PHOTO_QUESTIONS = {
    "astronaut": "Who is in this picture?",
    "chelsea": "What animal is this?",
    "coffee": "What stands on the table?",
}
PHOTO_SIDE = 672


def scenes(folder: Path) -> list[dict[str, Any]]:
    """Write the scenes that are asked about; the questions, in order of families and scenes."""
    asked = []
    for number, family in enumerate(FAMILIES):
        numbers = itertools.count()
        for _ in range(SCENES):
            question = None
            while question is None:
                one = scene("test", next(numbers))
                question = ask(one, family, np.random.default_rng([number, one.index]))
            name = f"scene-{one.index}.png"
            Image.fromarray(render(one)).save(folder / name)
            text = good_english(question.text)
            asked.append(_record(name, text, question.answer, family))
    return asked


def photographs(folder: Path) -> list[dict[str, Any]]:
    """Write the photographs; the questions about them."""
    for name, image in photos().items():
        if name in PHOTO_QUESTIONS:
            size = (PHOTO_SIDE, PHOTO_SIDE)
            image.resize(size, Image.Resampling.BICUBIC).save(folder / f"{name}.jpg")
    return [
        _record(f"{name}.jpg", question, None, "photograph")
        for name, question in PHOTO_QUESTIONS.items()
    ]


def prerender(folder: Path) -> None:
    """Write everything that `fsr-vllm demo` shows into `folder`, and remove what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("*.jpg"), *folder.glob("*.json")):
        old.unlink()
    write_json(folder / "scenes.json", scenes(folder))
    write_json(folder / "photographs.json", photographs(folder))


def _record(picture: str, question: str, answer: str | None, family: str) -> dict[str, Any]:
    return {"picture": picture, "question": question, "answer": answer, "family": family}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.testbed.prerender", description=__doc__
    )
    parser.add_argument("--output", type=Path, default=PICTURES)
    prerender(parser.parse_args().output)


if __name__ == "__main__":
    main()
