"""What is said of a scene and of its regions while the tower is trained, and when it is true."""

from __future__ import annotations

import functools
import re

import numpy as np

from .questions import ask
from .scenes import COLOURS, PATCHES, SHAPES, Scene, Thing, patches

_NAMED = re.compile(rf"(?:({'|'.join(COLOURS)})\b)? ?(?:\b({'|'.join(SHAPES)})\b)?")

Region = tuple[
    int, Thing | None, bool, tuple[int, ...]
]  # picture in the batch, thing or background, card?, patches


def caption(scene: Scene, random: np.random.Generator) -> str:
    """The objects of a scene in words, in random order; nothing about the background, or [CLS]
    would look at that.
    """
    order = random.permutation(len(scene.things))
    return " and ".join(_full(scene.things[index]) for index in order)


def regions_of(place: int, scene: Scene) -> list[Region]:
    """Every thing, every card, and the background of a scene."""
    found: list[Region] = [
        (place, thing, False, tuple(patches(thing.box))) for thing in scene.things
    ]
    found += [
        (place, thing, True, tuple(patches(thing.card))) for thing in scene.things if thing.card
    ]
    covered = {patch for region in found for patch in region[3]}
    return [
        *found,
        (place, None, False, tuple(patch for patch in range(PATCHES) if patch not in covered)),
    ]


def describe(
    scene: Scene, thing: Thing | None, card: bool, random: np.random.Generator
) -> list[str]:
    """Some of the texts that are true of a region: a short caption, and questions whose answer is
    seen there.
    """
    if thing is None:
        return ["What is the background?", *([scene.background] if scene.background else [])]
    if card:
        return [f"a digit {thing.digit}", f"Which digit is beside the {thing.name}?"]
    captions = [
        f"a {thing.name}",
        f"a {thing.shape}",
        f"a {thing.colour} thing",
        f"a {_full(thing)}",
    ]
    questions = [
        f"What colour is the {thing.shape}?",
        f"Which shape is {thing.colour}?",
        f"Is there a {thing.name}?",
    ]
    questions += [f"Is there more than one {thing.shape}?", f"How big is the {thing.shape}?"]
    if thing.digit:
        questions.append(f"Which digit is beside the {thing.name}?")
    related = ask(scene, "relation", random)
    if related:
        questions.append(related.text)
    return [captions[random.integers(4)], questions[random.integers(len(questions))]]


def says(text: str, scene: Scene, thing: Thing | None, card: bool) -> bool:
    """Whether a text speaks of a region; a question speaks of all that it names."""
    if thing is None:
        return text in ("What is the background?", scene.background)
    if text == f"a digit {thing.digit}":
        return card
    if card and not text.startswith("Which digit"):
        return False
    if ("small" in text or "big " in text.replace("How big ", "")) and thing.size not in text:
        return False
    return any(
        colour in (None, thing.colour) and shape in (None, thing.shape)
        for colour, shape in _named(text)
    )


@functools.cache
def _named(text: str) -> list[tuple[str | None, str | None]]:
    """The colour and the shape of everything that a text names; None where it leaves one open."""
    found = [match.groups() for match in _NAMED.finditer(text)]
    return [(colour, shape) for colour, shape in found if colour or shape]


def _full(thing: Thing) -> str:
    return f"{thing.size} {thing.name}"
