"""What scenes stand on: parts of photographs, each split its own, and drawn textures."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

# Photographs with a name of their own, by file of scikit-image's wheel; the drawn textures follow.
PHOTOS = {
    "bricks": "brick.png", "grass": "grass.png", "gravel": "gravel.png", "coins": "coins.png",
    "space": "hubble_deep_field.jpg", "garage": "motorcycle_left.png", "tissue": "ihc.png", "moon":
    "moon.png",
}  # fmt: skip
_TEXTURES = ("stripes", "checks", "dots", "waves")
BACKGROUNDS = (*PHOTOS, *_TEXTURES)
UNSEEN = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
)  # only under test scenes, never asked about
# Which part of a photograph's width belongs to a split; strips between them belong to none.
STRIPS = {"train": (0.0, 0.5), "validation": (0.52, 0.75), "test": (0.77, 1.0)}


def background(name: str | None, split: str, side: int, random: np.random.Generator) -> np.ndarray:
    """A texture or a crop of a photograph, of low contrast and tinted at random.

    No `name`: one of the photographs that have none.
    """
    if name in _TEXTURES:
        grey = _texture(name, side, random)
        picture = np.repeat(grey[..., None], 3, 2)
    else:
        file = PHOTOS[name] if name else UNSEEN[random.integers(len(UNSEEN))]
        picture = _crop(_photo(file), STRIPS[split], side, random)
    tint = random.uniform(0.85, 1.15, 3)
    level, contrast = random.uniform(95, 145), random.uniform(0.4, 0.65)
    return (level + (picture - picture.mean()) * contrast * tint).clip(0, 255).astype(np.uint8)


def _crop(
    photo: np.ndarray, strip: tuple[float, float], size: int, random: np.random.Generator
) -> np.ndarray:
    height, width = photo.shape[:2]
    left, right = int(strip[0] * width), int(strip[1] * width)
    side = int(min(random.uniform(80, 160), right - left, height))
    x, y = left + random.integers(right - left - side + 1), random.integers(height - side + 1)
    crop = Image.fromarray(photo[y : y + side, x : x + side]).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    return np.asarray(crop, np.float32)


@functools.cache
def _photo(file: str) -> np.ndarray:
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the scenes' photographs are scikit-image's: pip install scikit-image")
    with Image.open(Path(spec.submodule_search_locations[0]) / "data" / file) as image:
        return np.asarray(image.convert("RGB"))


def _texture(name: str, side: int, random: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:side, :side].astype(np.float32)
    angle, period, phase = random.uniform(0, np.pi), random.uniform(8, 20), random.uniform(0, 20, 2)
    along = x * np.cos(angle) + y * np.sin(angle) + phase[0]
    across = y * np.cos(angle) - x * np.sin(angle) + phase[1]
    if name == "stripes":
        pattern = along % period < period / 2
    elif name == "checks":
        pattern = (along % period < period / 2) ^ (across % period < period / 2)
    elif name == "dots":
        pattern = np.hypot(along % period - period / 2, across % period - period / 2) < period / 3.2
    else:
        pattern = (along + 5 * np.sin(across * 2 * np.pi / (2 * period))) % period < period / 2
    return pattern * 200.0 + 28.0
