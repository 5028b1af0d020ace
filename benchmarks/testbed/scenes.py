"""Scenes of the testbed: coloured shapes and handwritten digits on textures and photographs, drawn
from a seed.

A scene is 96 x 96 pixels, 12 x 12 patches of 8 pixels, 16 cells of 3 x 3 patches. Everything is
deterministic in (split, index). The splits share no seed, no digit image and no part of a
photograph; one test scene in five stands on a photograph that no other split knows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .backgrounds import BACKGROUNDS, background

SIDE, PATCH, GRID, CELL = 96, 8, 12, 24
PATCHES = GRID * GRID
COLOURS = {
    "red": (222, 36, 36), "green": (30, 160, 50), "blue": (35, 70, 220), "yellow": (245, 220, 40),
    "purple": (140, 45, 170), "cyan": (60, 215, 230), "orange": (245, 135, 25), "white": (246, 246,
    246),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "arrow")
SIZES = {"small": 16, "big": 24}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Thing:
    """One shape, and the digit on the card beside it, if it has one; boxes are (top, left, bottom,
    right) in pixels.
    """

    colour: str
    shape: str
    size: str
    box: tuple[int, int, int, int]
    digit: str | None = None
    card: tuple[int, int, int, int] | None = None

    @property
    def name(self) -> str:
        """What questions call it."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What is where; `background` is None under a photograph that has no name."""

    split: str
    index: int
    things: tuple[Thing, ...]
    background: str | None

    @property
    def generator(self) -> np.random.Generator:
        """The random numbers behind everything that a question does not ask about."""
        return _generator(self.split, self.index, 1)


def patches(box: tuple[int, int, int, int]) -> list[int]:
    """Raster numbers of the patches of which a box covers at least half."""
    top, left, bottom, right = box
    rows = [
        r for r in range(GRID) if min(bottom, (r + 1) * PATCH) - max(top, r * PATCH) >= PATCH / 2
    ]
    columns = [
        c for c in range(GRID) if min(right, (c + 1) * PATCH) - max(left, c * PATCH) >= PATCH / 2
    ]
    return [r * GRID + c for r in rows for c in columns]


def scene(split: str, index: int) -> Scene:
    """The scene of that number: 4 to 7 shapes, up to 3 of them with a digit. ValueError for an
    unknown split.
    """
    random = _generator(split, index, 0)
    cells = [divmod(int(cell), 4) for cell in random.permutation(16)]
    count, cards, things = int(random.integers(4, 8)), int(random.integers(1, 4)), []
    kinds = [(str(random.choice(list(COLOURS))), str(random.choice(SHAPES))) for _ in range(count)]
    if (
        random.random() < 0.5
    ):  # a second one of the same shape, so that counting has something to count
        kinds[1] = (kinds[1][0], kinds[0][1])
    for colour, shape in kinds:
        row, column = cells.pop(0)
        size = str(random.choice(list(SIZES)))
        card = (row, column + 1) in cells and cards > 0
        if card:
            cells.remove((row, column + 1))
            cards -= 1
        box = _box(row, column, SIZES[size], random)
        digit = DIGITS[random.integers(10)] if card else None
        things.append(
            Thing(
                colour,
                shape,
                size,
                box,
                digit,
                _box(row, column + 1, 16, random, 0) if card else None,
            )
        )
        if not cells:
            break
    unseen = split == "test" and random.random() < 0.2
    background = BACKGROUNDS[random.integers(len(BACKGROUNDS))]
    return Scene(split, index, tuple(things), None if unseen else background)


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, (96, 96, 3) uint8."""
    random = scene.generator
    picture = background(scene.background, scene.split, SIDE, random)
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    for _ in range(
        int(random.integers(0, 4))
    ):  # clutter: short strokes of no colour that is asked about
        x, y = (int(v) for v in random.integers(0, SIDE - 12, 2))
        dx, dy = (int(v) for v in random.integers(3, 12, 2))
        draw.line((x, y, x + dx, y + dy), fill=(int(random.integers(40, 200)),) * 3, width=2)
    for thing in scene.things:
        _stamp(canvas, thing, random)
        if thing.digit and thing.card:
            canvas.paste(
                _card(scene.split, DIGITS.index(thing.digit), random),
                (thing.card[1], thing.card[0]),
            )
    noisy = np.asarray(canvas, np.float32) + random.normal(0, 4, (SIDE, SIDE, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def _generator(split: str, index: int, stream: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    return np.random.default_rng([SPLITS.index(split), index, stream])


def _box(
    row: int, column: int, size: int, random: np.random.Generator, left: int | None = None
) -> tuple:
    """A box in a cell, on the patch grid but for a pixel: patches then hold all of a shape's part,
    or little of it.
    """
    room = (CELL - size) // PATCH
    down, right = (int(random.integers(0, room + 1)) * PATCH for _ in range(2))
    shift = [int(v) for v in random.integers(-1, 2, 2)] if size < CELL else [0, 0]
    top = row * CELL + down + shift[0]
    start = column * CELL + (right if left is None else left) + shift[1]
    top, start = min(max(top, 0), SIDE - size), min(max(start, 0), SIDE - size)
    return top, start, top + size, start + size


def _stamp(canvas: Image.Image, thing: Thing, random: np.random.Generator) -> None:
    """Draw a shape at four times its size and shrink it: smooth edges, and a dark rim that sets it
    off.
    """
    size = thing.box[2] - thing.box[0]
    mask, rim = _mask(thing.shape, size)
    colour = np.asarray(COLOURS[thing.colour]) + random.integers(-14, 15, 3)
    fill = tuple(int(v) for v in colour.clip(0, 255))
    place = (thing.box[1], thing.box[0])
    canvas.paste(Image.new("RGB", (size, size), (15, 15, 15)), place, rim)
    canvas.paste(Image.new("RGB", (size, size), fill), place, mask)


@functools.cache
def _mask(shape: str, size: int) -> tuple[Image.Image, Image.Image]:
    def drawn(inset: float) -> Image.Image:
        big = Image.new("L", (size * 4, size * 4))
        _draw_shape(ImageDraw.Draw(big), shape, size * 4, inset * 4)
        return big.resize((size, size), Image.Resampling.BOX)

    return drawn(1.5), drawn(0.0)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, n: int, m: float) -> None:
    """One of SHAPES in white, n pixels wide, m pixels from the edge."""
    low, high, half = m, n - 1 - m, (n - 1) / 2
    if shape in ("circle", "ring"):
        draw.ellipse((low, low, high, high), fill=255)
        if shape == "ring":
            hole = n * 0.27 - m * 0.6
            draw.ellipse((half - hole, half - hole, half + hole, half + hole), fill=0)
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=255)
    elif shape == "cross":
        arm = n * 0.19 - m * 0.4
        draw.rectangle((low, half - arm, high, half + arm), fill=255)
        draw.rectangle((half - arm, low, half + arm, high), fill=255)
    elif shape == "star":
        turns = np.arange(10) * np.pi / 5 - np.pi / 2
        reach = np.where(np.arange(10) % 2, 0.42, 1.0) * (half - m)
        points = np.stack([half + reach * np.cos(turns), half + reach * np.sin(turns)], 1)
        draw.polygon([(float(x), float(y)) for x, y in points], fill=255)
    else:
        quarter = n * 0.25
        outlines = {
            "triangle": [(half, low), (high, high), (low, high)],
            "diamond": [(half, low), (high, half), (half, high), (low, half)],
            "arrow": [(high, half), (half, low), (half, quarter + m), (low, quarter + m),
                      (low, n - quarter - m), (half, n - quarter - m), (half, high)],
        }  # fmt: skip
        draw.polygon(outlines[shape], fill=255)


@functools.cache
def _digits(split: str) -> tuple[np.ndarray, ...]:
    """The handwritten digits of a split, by value: the UCI test set that scikit-learn carries, 8 x
    8 each.
    """
    from sklearn.datasets import load_digits

    images, values = load_digits(return_X_y=True)
    part = {"train": (0, 6), "validation": (6, 7), "test": (7, 10)}[split]
    mine = np.isin(np.arange(len(values)) % 10, range(*part))
    return tuple(images[mine & (values == value)].reshape(-1, 8, 8) for value in range(10))


def _card(split: str, value: int, random: np.random.Generator) -> Image.Image:
    """A 16 x 16 card with one digit in dark ink."""
    pool = _digits(split)[value]
    ink = Image.fromarray((pool[random.integers(len(pool))] * (255 / 16)).astype(np.uint8))
    card, ink = (
        Image.new("L", (16, 16), int(random.integers(225, 250))),
        ink.resize((14, 14), Image.Resampling.BICUBIC),
    )
    place = (1, 1)
    if split == "train":  # a thousand digits are few: each comes turned and shifted a little
        ink = ink.rotate(random.uniform(-15, 15), Image.Resampling.BICUBIC)
        place = (int(random.integers(0, 3)), int(random.integers(0, 3)))
    card.paste(20, place, ink)
    ImageDraw.Draw(card).rectangle((0, 0, 15, 15), outline=90)
    return card.convert("RGB")
