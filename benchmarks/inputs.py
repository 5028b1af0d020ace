"""What one measurement runs on: its sizes, and random tokens and signals of these sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fsr_vllm.methods import VisualTokens
from fsr_vllm.methods.base import Method

_CLUSTERS = 60  # groups of similar tokens in an image: cosines then vary as they do between patches
_TEXT = 20  # tokens of a question
_FRAMES = 8


@dataclass(frozen=True)
class Cell:
    """One combination of sizes: K of N tokens of width D, for a batch of images."""

    n: int
    k: int
    d: int
    batch: int

    def __str__(self) -> str:
        return f"{self.n} -> {self.k}, D = {self.d}, batch {self.batch}"


@dataclass(frozen=True)
class Images:
    """The features of a cell, and where and how its signals are drawn."""

    cell: Cell
    features: Tensor
    generator: torch.Generator

    @classmethod
    def draw(cls, cell: Cell, device: str, dtype: torch.dtype) -> Images:
        g = torch.Generator(device).manual_seed(0)
        centres = torch.randn(_CLUSTERS, cell.d, generator=g, device=device)
        member = torch.randint(_CLUSTERS, (cell.batch, cell.n), generator=g, device=device)
        noise = torch.randn(cell.batch, cell.n, cell.d, generator=g, device=device)
        return cls(cell, (centres[member] + noise.mul_(0.7)).to(dtype), g)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(
            self.cell.batch, *shape, generator=self.generator, device=self.features.device
        )

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(
            self.cell.batch, *shape, generator=self.generator, device=self.features.device
        )

    def tokens(self, method: Method) -> VisualTokens:
        """The features with random values in every field that the method needs or uses."""
        n, d, dtype = self.cell.n, self.cell.d, self.features.dtype
        probes: dict[str, Callable[[], Tensor]] = {
            "sparsevlm": lambda: self._uniform(n, _TEXT),
            "dart": lambda: self._normal(n, d),
            "ivc": lambda: self._uniform(n, n + _TEXT),
        }
        makers: dict[str, Callable[[], Any]] = {
            "saliency": lambda: self._normal(n).exp(),
            "relevance": lambda: self._normal(n),
            "metric": lambda: self._normal(n, 1024).to(dtype),
            "keys": lambda: self._normal(n, 64),
            "cls_row": lambda: self._normal(d).to(dtype),
            "shallow_saliency": lambda: self._normal(n).exp(),
            "received": lambda: self._normal(n).exp(),
            "shallow_received": lambda: self._normal(n).exp(),
            "attention": lambda: self._uniform(n, n).div_(n),
            "last_query": lambda: self._normal(1024),
            "last_key": lambda: self._normal(n + 1, 1024),
            "text": lambda: self._normal(_TEXT, d).to(dtype),
            "prototypes": lambda: self._normal(454, d).to(
                dtype
            ),  # as many as the file published for LLaVA-1.5-7B
            "grid": lambda: near_square(n),
            "frame_weights": lambda: self._uniform(_FRAMES),
            "probe": probes.get(method.name, lambda: self._uniform(n)),
            "group": lambda: torch.arange(self.cell.batch, device=self.features.device),
        }
        wanted = dict.fromkeys((*method.needs, *method.uses))
        return VisualTokens(self.features, **{name: makers[name]() for name in wanted})

    def weighted(self) -> VisualTokens:
        """Tokens whose saliency and relevance make FSR's focus end at exactly K_F = max(1, K // 4).

        So the scan has 3/4 of K to find. phi is about 1 for K_F tokens; the others share what
        leaves these with just over nine tenths of the sum (rho = 0.9). One token has the lowest
        saliency and another the lowest relevance, both 0, so that scaling to [0, 1] changes
        nothing.
        """
        n, m = self.cell.n, max(1, self.cell.k // 4)
        if n < m + 3:
            raise ValueError(f"{n} tokens are too few for a focus of {m}")
        high = torch.linspace(1.0, 0.99, m, dtype=torch.float64)
        whole = float(high.sum())
        # 0.9 (whole + rest) has to lie above whole - the last and up to whole: in the middle, if
        # rest is then > 0.
        rest = max(whole / 18, (whole - 0.5) / 0.9 - whole)
        g = torch.Generator().manual_seed(1)
        share = torch.rand(n - m - 2, generator=g, dtype=torch.float64) + 0.5
        relevance = torch.rand(n - m - 2, generator=g, dtype=torch.float64) * 0.4 + 0.6
        saliency = rest * share / share.sum() / relevance**3
        s = torch.cat([high, saliency, torch.tensor([0.0, 0.5])])
        r = torch.cat([torch.ones(m), relevance, torch.tensor([0.5, 0.0])])
        place = torch.stack([torch.randperm(n, generator=g) for _ in range(self.cell.batch)])
        device = self.features.device
        return VisualTokens(
            self.features,
            saliency=s[place].float().to(device),
            relevance=r[place].float().to(device),
        )


def near_square(n: int) -> tuple[int, int]:
    """(h, w) with h * w = n, h the largest divisor not above the root."""
    h = max(side for side in range(1, math.isqrt(n) + 1) if n % side == 0)
    return h, n // h
