"""The objects that travel between the engine's rooms, from pixels to the rows vLLM gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fsr_vllm.params import ImagePlan


def batched(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of equal shape as one batch (B, ...): a view of a single one, a copy of several."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One image as it reaches the model."""

    pixels: Mapping[str, Any]  # this image's part of what `embed_multimodal` was given, by its name
    plan: ImagePlan
    key: bytes | None = None  # of the feature cache; None: never cached
    # What the host has to know of it: (height, width) in pixels, or a grid; the family says.
    size: tuple[int, ...] = ()
    work: int = 0  # patches that the tower computes for it; 0: as many as its tokens

    @property
    def cost(self) -> int:
        """What the image counts where the tower's work is limited."""
        return self.work or self.plan.total


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """What depends on an image alone, and so is worth keeping for the next question about it.

    Each family chooses what it keeps (the tower's output, or final rows), with the signals that
    were read while the tower ran.
    """

    tensors: Mapping[str, Tensor]
    size: tuple[int, ...] = ()  # the image's own, see ImageInput; never on a device


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image's N rows as methods see them, with all that is known about each.

    Rows that are no candidates (newlines between the rows of a grid) belong to no group.
    """

    rows: Tensor  # (N, D), what vLLM would get unpruned
    signals: Mapping[str, Tensor] = field(default_factory=dict)  # (N, ...) each, by name
    # What a method is told about a group as a whole, by name: one entry per group, in any shape.
    group_signals: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    groups: tuple[Tensor, ...] = ()  # rows of each tile, ascending int64; (): one group of all rows
    grids: tuple[tuple[int, int] | None, ...] = (None,)  # (h, w) of each group whose rows form one
    tower: Tensor | None = None  # (P, Dv) per patch: where the text encoder measures relevance
    carried: Tensor | None = None  # (N, C), goes along with the kept rows by index, never merged
    patches: Tensor | None = None  # (N, 2) int64: tile and patch of each row, -1 for a newline

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each group."""
        return tuple(len(group) for group in self.groups) or (self.rows.shape[0],)
