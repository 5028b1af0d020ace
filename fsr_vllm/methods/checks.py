"""Checks of what a method is given, once for all methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import Method, VisualTokens

# Dimensions of one image: N, D are those of features, other letters stand for any size, equal where
# they recur.
_SHAPES: dict[str, tuple[str, ...]] = {
    "features": ("N", "D"), "saliency": ("N",), "relevance": ("N",), "shallow_saliency": ("N",),
    "received": ("N",), "shallow_received": ("N",), "metric": ("N", "Dm"),
    "keys": ("N", "Dk"), "cls_row": ("D",), "attention": ("N", "N"), "last_query": ("C",),
    "last_key": ("N|N+1", "C"), "text": ("T", "Dt"), "prototypes": ("P", "D"),
    "frame_weights": ("F",), "probe": ("N", "..."),
}  # fmt: skip
_SHARED = ("text", "prototypes")  # may come without B and then serve every image of the batch


def checked_fields(tokens: VisualTokens, method: Method, finite: bool) -> VisualTokens:
    """The features and the fields that the method declared, with B in front.

    Fields not declared are dropped: a method cannot come to depend on them. Only the look for NaN
    and Inf, done where `finite`, waits for the device. ValueError that names the field at fault.
    """
    features = tokens.features
    tensor = isinstance(features, Tensor) and features.is_floating_point()
    if not tensor or features.dim() not in (2, 3):
        raise ValueError("features must be a floating-point tensor of shape (N, D) or (B, N, D)")
    if not features.numel():
        raise ValueError(f"features must not be empty; got shape {tuple(features.shape)}")
    single = features.dim() == 2
    sizes = dict(zip("ND" if single else "BND", features.shape, strict=True))
    found: dict[str, Any] = {}
    for name in dict.fromkeys(("features", *method.needs, *method.uses)):
        value = getattr(tokens, name)
        if value is None:
            if name in method.needs:
                raise ValueError(f"{name} is needed by this method and was not given")
            continue
        if name == "grid":
            found[name] = _check_grid(value, sizes["N"])
            continue
        _check_tensor(name, value, features.device, finite)
        if name == "group":
            fits = value.dim() <= 1 and value.numel() == sizes.get("B", 1)
            wanted = "group must hold one integer per image of the batch"
            expect(fits and not value.is_floating_point(), wanted, f"shape {tuple(value.shape)}")
            found[name] = value.reshape(-1)
            continue
        shared = name in _SHARED and not single and value.dim() == len(_SHAPES[name])
        _check_shape(name, value, ("B",) * (not single and not shared) + _SHAPES[name], sizes)
        value = value[None] if single or shared else value
        found[name] = value.expand(sizes["B"], *value.shape[1:]) if shared else value
    return type(tokens)(**found)


def expect(fits: bool, wanted: str, got: object) -> None:
    """ValueError that says what is wanted and what was given, unless it fits."""
    if not fits:
        raise ValueError(f"{wanted}; got {got}")


def expect_width(text: Tensor, features: Tensor) -> None:
    """ValueError unless text (B, T, D) is in the space of features (B, N, D)."""
    wanted = f"text must have the width of features, {features.shape[2]}"
    expect(text.shape[2] == features.shape[2], wanted, text.shape[2])


def _check_grid(grid: object, n: int) -> tuple[int, int]:
    sides = list(grid) if isinstance(grid, (tuple, list)) else []
    positive = len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)
    if not positive or sides[0] * sides[1] != n:
        raise ValueError(f"grid must be (h, w) with h * w = N = {n}; got {grid!r}")
    return sides[0], sides[1]


def _check_tensor(name: str, value: object, device: torch.device, finite: bool) -> None:
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        given = getattr(value, "dtype", type(value).__name__)
        raise ValueError(f"{name} must be a tensor of real numbers; got {given}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, features are on {device}")
    # NaN and Inf show in the extremes, at a fifteenth of the time; in float32, where methods
    # compute.
    if finite and value.numel() and not bool(torch.stack(value.aminmax()).float().isfinite().all()):
        raise ValueError(f"{name} holds NaN or Inf")


def _check_shape(name: str, value: Tensor, wanted: tuple[str, ...], sizes: dict[str, int]) -> None:
    rest = wanted[-1] == "..."
    names = wanted[:-1] if rest else wanted
    fits = value.dim() == len(names) or rest and value.dim() > len(names)
    for letter, size in zip(names, value.shape, strict=False):
        n = sizes["N"]
        fits &= size in ((n, n + 1) if letter == "N|N+1" else (sizes.setdefault(letter, size),))
    if not fits:
        letters = [letter for letter in dict.fromkeys(names) if letter in sizes]
        known = ", ".join(f"{letter} = {sizes[letter]}" for letter in letters)
        raise ValueError(
            f"{name} must have shape ({', '.join(wanted)}) with {known}; got {tuple(value.shape)}"
        )
