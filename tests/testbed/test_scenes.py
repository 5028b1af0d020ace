"""Scenes and questions: the same from the same seed, disjoint between splits, and answers that are
true.
"""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.testbed import backgrounds, questions, scenes
from benchmarks.testbed.questions import FAMILIES, ask, balanced
from benchmarks.testbed.scenes import DIGITS, PATCH, PATCHES, SIDE, SPLITS, patches, render, scene

places = st.tuples(st.sampled_from(SPLITS), st.integers(0, 100_000))


@settings(max_examples=30, deadline=None)
@given(places)
def test_a_scene_is_its_number(place):
    one, again = scene(*place), scene(*place)
    assert one == again
    picture = render(one)
    assert picture.shape == (SIDE, SIDE, 3) and picture.dtype == np.uint8
    assert (picture == render(again)).all()


def test_splits_draw_different_scenes():
    drawn = [[scene(split, index).things for index in range(30)] for split in SPLITS]
    assert (
        not set(drawn[0]) & set(drawn[1])
        and not set(drawn[1]) & set(drawn[2])
        and not set(drawn[0]) & set(drawn[2])
    )


def test_no_digit_image_is_in_two_splits():
    seen = [
        {image.tobytes() for pool in scenes._digits(split) for image in pool} for split in SPLITS
    ]
    assert all(len(pool) == 10 and min(map(len, pool)) > 5 for pool in map(scenes._digits, SPLITS))
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_no_part_of_a_photograph_is_in_two_splits():
    strips = [backgrounds.STRIPS[split] for split in SPLITS]
    assert all(left[1] < right[0] for left, right in zip(strips, strips[1:], strict=False))
    assert not set(backgrounds.UNSEEN) & set(backgrounds.PHOTOS.values())
    found = {split: [scene(split, index).background for index in range(100)] for split in SPLITS}
    assert None in found["test"] and None not in found["train"] + found["validation"]


@settings(max_examples=60, deadline=None)
@given(places)
def test_things_neither_overlap_nor_leave_the_picture(place):
    boxes = [box for thing in scene(*place).things for box in (thing.box, thing.card) if box]
    covered = Counter()
    for top, left, bottom, right in boxes:
        assert 0 <= top < bottom <= SIDE and 0 <= left < right <= SIDE
        covered.update(
            (y, x) for y in range(top + 1, bottom - 1) for x in range(left + 1, right - 1)
        )
    assert max(covered.values()) == 1
    for box in boxes:
        assert patches(box) and all(0 <= patch < PATCHES for patch in patches(box))


@settings(max_examples=150, deadline=None)
@given(places, st.sampled_from(list(FAMILIES)), st.integers(0, 1000))
def test_answers_are_true(place, family, seed):
    one = scene(*place)
    question = ask(one, family, np.random.default_rng(seed))
    if question is None:
        return
    assert question.family == family and all(0 <= patch < PATCHES for patch in question.targets)
    assert truth(one, question.text) == question.answer


def truth(one, text):
    """The answer, found in another way than by the code that asks: by reading the question."""
    words = text.rstrip("?").split()
    named = [thing for thing in one.things if thing.shape in words or thing.colour in words]
    both = [thing for thing in named if thing.shape in words and thing.colour in words]
    if text.startswith("What is the background"):
        return one.background
    if text.startswith("What colour"):
        (thing,) = named
        return thing.colour
    if text.startswith("How big"):
        (thing,) = named
        return thing.size
    if text.startswith("Which shape"):
        (thing,) = named
        return thing.shape
    if text.startswith("Which digit"):
        (thing,) = both
        assert thing.digit in DIGITS
        # The card stands to the right of its thing, in the next cell of the same row.
        assert (thing.card[1] + 8) // 24 == (thing.box[1] + 8) // 24 + 1
        return thing.digit
    if text.startswith("Is there more than one"):
        return "yes" if len(named) > 1 else "no"
    if text.startswith("Is there a"):
        return "yes" if both else "no"
    first, relation, second = re.fullmatch(
        r"Is the (.+) (left of|right of|above|below) the (.+)\?", text
    ).groups()
    a, b = (
        next(thing for thing in one.things if thing.name == name).box for name in (first, second)
    )
    holds = {
        "left of": a[1] < b[1],
        "right of": a[1] > b[1],
        "above": a[0] < b[0],
        "below": a[0] > b[0],
    }
    return "yes" if holds[relation] else "no"


def test_targets_show_what_is_asked_about():
    for index in range(50):
        one = scene("validation", index)
        question = ask(one, "digit", np.random.default_rng(index))
        if question:
            (thing,) = [thing for thing in one.things if thing.name in question.text]
            inside = {patch for box in (thing.box, thing.card) for patch in patches(box)}
            assert set(question.targets) == inside
            row, column = divmod(question.targets[0], SIDE // PATCH)
            assert abs(row * PATCH - min(thing.box[0], thing.card[0])) <= PATCH and column >= 0


@pytest.mark.parametrize("family", list(FAMILIES))
def test_balanced_questions_have_no_favourite_answer(family):
    asked = [
        ask(scene("test", index), family, np.random.default_rng(index)) for index in range(400)
    ]
    chosen = balanced([question for question in asked if question], 120)
    assert len(chosen) == 120
    counts = Counter(question.answer for question in chosen)
    # The rarest answers may run out (sizes are asked for less often); the most frequent one must
    # not stand out.
    assert max(counts.values()) <= 120 / len(counts) * 1.5


def test_bad_arguments():
    with pytest.raises(ValueError, match="split must be one of train, validation, test"):
        scene("training", 0)
    with pytest.raises(ValueError, match="family must be one of attribute"):
        ask(scene("train", 0), "colour", np.random.default_rng(0))


def test_vocabulary_holds_every_word():
    known = set(re.findall(r"\w+", " ".join(questions.vocabulary())))
    for index in range(60):
        for family in FAMILIES:
            question = ask(scene("train", index), family, np.random.default_rng(index))
            if question:
                assert set(re.findall(r"\w+", f"{question.text} {question.answer}")) <= known
