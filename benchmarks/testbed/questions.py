"""Questions about scenes, in the families of the paper's benchmarks, each with a one-word answer.

attribute and object look one thing up by the other (GQA-like), existence is POPE-like (balanced;
half of the absent things are near misses), digit is reading beside a named object (TextVQA-like),
count and relation are yes/no and balanced, scene asks for the background.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .scenes import BACKGROUNDS, COLOURS, DIGITS, PATCHES, SHAPES, SIZES, Scene, Thing, patches

RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Question:
    """One question; `targets` are the patches that show what it asks about, for the oracle."""

    family: str
    text: str
    answer: str
    targets: tuple[int, ...]


def ask(scene: Scene, family: str, random: np.random.Generator) -> Question | None:
    """A question of that family, or None where the scene has nothing to ask about. ValueError:
    unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")
    found = FAMILIES[family](scene, random)
    return None if found is None else Question(family, *found)


def good_english(text: str) -> str:
    """The text with "an" where it has to stand. The models were trained on "a" alone, and
    understand both.
    """
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def vocabulary() -> list[str]:
    """Every text that the questions and answers are made of, for the tokenizers."""
    nouns = [f"the {colour} {shape}?" for colour in COLOURS for shape in SHAPES]
    fixed = [
        "What colour is",
        "Which shape is",
        "Which digit is beside",
        "What is the background?",
        "How big is",
    ]
    fixed += [
        "Is there more than one",
        "Is there a",
        *(f"Is it {relation}" for relation in RELATIONS),
    ]
    fixed += ["USER: ASSISTANT:", "and What How Which Is"]
    captions = [f"a {size} digit {digit} thing beside on" for digit in DIGITS for size in SIZES]
    return [
        *nouns,
        *fixed * 9,
        *captions,
        *(f"and a {word}" for word in (*BACKGROUNDS, "yes", "no") * 4),
    ]


def balanced(questions: list[Question], count: int) -> list[Question]:
    """The first `count` questions in which no answer is more frequent than its fair share by more
    than needed.
    """
    by_answer: dict[str, list[Question]] = {}
    for question in questions:
        by_answer.setdefault(question.answer, []).append(question)
    taken: list[Question] = []
    while len(taken) < count and any(by_answer.values()):
        for pile in by_answer.values():
            if pile and len(taken) < count:
                taken.append(pile.pop(0))
    return taken


Found = tuple[str, str, tuple[int, ...]] | None


def _attribute(scene: Scene, random: np.random.Generator) -> Found:
    single = _single(scene, lambda thing: thing.shape)
    if not single:
        return None
    thing = _pick(single, random)
    if random.random() < 0.25:
        return f"How big is the {thing.shape}?", thing.size, _of(thing)
    return f"What colour is the {thing.shape}?", thing.colour, _of(thing)


def _object(scene: Scene, random: np.random.Generator) -> Found:
    single = _single(scene, lambda thing: thing.colour)
    if not single:
        return None
    thing = _pick(single, random)
    return f"Which shape is {thing.colour}?", thing.shape, _of(thing)


def _existence(scene: Scene, random: np.random.Generator) -> Found:
    there = {thing.name for thing in scene.things}
    if random.random() < 0.5:
        thing = _pick(scene.things, random)
        same = [other for other in scene.things if other.name == thing.name]
        return f"Is there a {thing.name}?", "yes", _of(*same)
    colours, shapes = (
        sorted({t.colour for t in scene.things}),
        sorted({t.shape for t in scene.things}),
    )
    if random.random() < 0.5:  # near miss: half of the name is in the picture
        one = random.random() < 0.5
        names = [
            f"{c} {s}" for c in (colours if one else COLOURS) for s in (SHAPES if one else shapes)
        ]
    else:
        names = [
            f"{c} {s}" for c in COLOURS for s in SHAPES if c not in colours and s not in shapes
        ]
    absent = [name for name in names if name not in there]
    if not absent:
        return None
    name = str(random.choice(absent))
    near = [thing for thing in scene.things if set(thing.name.split()) & set(name.split())]
    return f"Is there a {name}?", "no", _of(*near)


def _digit(scene: Scene, random: np.random.Generator) -> Found:
    cards = [thing for thing in _single(scene, lambda thing: thing.name) if thing.digit]
    if not cards:
        return None
    thing = _pick(cards, random)
    return f"Which digit is beside the {thing.name}?", str(thing.digit), _of(thing)


def _count(scene: Scene, random: np.random.Generator) -> Found:
    seen = Counter(thing.shape for thing in scene.things)
    wanted = random.random() < 0.5
    shapes = sorted(shape for shape, n in seen.items() if (n > 1) == wanted)
    if not shapes:
        return None
    shape = str(random.choice(shapes))
    same = [thing for thing in scene.things if thing.shape == shape]
    return f"Is there more than one {shape}?", "yes" if wanted else "no", _of(*same)


def _relation(scene: Scene, random: np.random.Generator) -> Found:
    single = _single(scene, lambda thing: thing.name)
    relation = RELATIONS[random.integers(4)]
    axis = 0 if relation in ("above", "below") else 1
    pairs = [
        (a, b)
        for a in single
        for b in single
        if abs(a.box[axis] - b.box[axis]) >= 16 and a is not b
    ]
    if not pairs:
        return None
    first, second = pairs[random.integers(len(pairs))]
    before = first.box[axis] < second.box[axis]
    true = before == (relation in ("left of", "above"))
    return (
        f"Is the {first.name} {relation} the {second.name}?",
        "yes" if true else "no",
        _of(first, second),
    )


def _scene(scene: Scene, random: np.random.Generator) -> Found:
    if scene.background is None:
        return None
    covered = set(_of(*scene.things))
    return (
        "What is the background?",
        scene.background,
        tuple(p for p in range(PATCHES) if p not in covered),
    )


FAMILIES: dict[str, Callable[[Scene, np.random.Generator], Found]] = {
    "attribute": _attribute, "object": _object, "existence": _existence, "digit": _digit,
    "scene": _scene, "count": _count, "relation": _relation,
}  # fmt: skip


def _single(scene: Scene, key: Callable[[Thing], str]) -> list[Thing]:
    """The things that this key tells from all others."""
    seen = Counter(key(thing) for thing in scene.things)
    return [thing for thing in scene.things if seen[key(thing)] == 1]


def _pick(things: list[Thing] | tuple[Thing, ...], random: np.random.Generator) -> Thing:
    return things[random.integers(len(things))]


def _of(*things: Thing) -> tuple[int, ...]:
    boxes = [box for thing in things for box in (thing.box, thing.card) if box]
    return tuple(sorted({patch for box in boxes for patch in patches(box)}))
