"""Pictures of the testbed in memory, and their way into a CLIP tower."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint import CLIP_MEAN, CLIP_STD
from .scenes import SIDE, Scene, render, scene

_FEW = 2000  # pictures that are drawn before other processes would be ready to help


@dataclass
class Pictures:
    """The first `len(scenes)` scenes of a split with their pictures, (count, 96, 96, 3) uint8."""

    scenes: list[Scene]
    images: np.ndarray

    @classmethod
    def of(cls, split: str, count: int, folder: Path | None = None) -> Pictures:
        """Draw them, or take them from `folder`, where they were left the last time."""
        scenes = [scene(split, index) for index in range(count)]
        file = None if folder is None else folder / f"{split}-{count}.npy"
        if file is not None and file.exists():
            return cls(scenes, np.load(file, mmap_mode="r"))
        images = np.empty((count, SIDE, SIDE, 3), np.uint8)
        with ProcessPoolExecutor() if count > _FEW else nullcontext() as pool:
            drawn = map(render, scenes) if pool is None else pool.map(render, scenes, chunksize=200)
            bar = tqdm(drawn, desc=f"drawing {split}", total=count, unit="scene", mininterval=1)
            for index, picture in enumerate(bar):
                images[index] = picture
        if file is not None:
            unfinished = file.with_suffix(".part.npy")
            np.save(unfinished, images)
            unfinished.rename(file)
        return cls(scenes, images)


def pixels(images: np.ndarray | Tensor, device: str | torch.device = "cpu") -> Tensor:
    """CLIP's preprocessing of pictures that already have the tower's size: (B, H, W, 3) uint8 ->
    (B, 3, H, W).
    """
    found = images if isinstance(images, Tensor) else torch.from_numpy(np.ascontiguousarray(images))
    scaled = found.to(device).float() / 255
    mean, std = (torch.tensor(values, device=device) for values in (CLIP_MEAN, CLIP_STD))
    return ((scaled - mean) / std).permute(0, 3, 1, 2).contiguous()
