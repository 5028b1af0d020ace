"""Means over families, and how sure they are: scenes are resampled, since questions about one scene
go together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_RESAMPLES = 2000
# Beyond two standard errors and this much above the most frequent answer, a family tells methods
# apart.
_CLEARLY = 0.1


def admitted(right: Mapping[str, float], majority: Mapping[str, float], count: int) -> list[str]:
    """The families whose unpruned accuracy clearly beats their majority answer."""
    error = {family: (p * (1 - p) / count) ** 0.5 for family, p in right.items()}
    return [
        family
        for family in right
        if right[family] - 2 * error[family] > majority[family] + _CLEARLY
    ]


def macro(right: np.ndarray, families: np.ndarray, counted: Sequence[str]) -> float:
    """Mean over families of the share of right answers; nan without families."""
    return (
        float(np.mean([right[families == family].mean() for family in counted]))
        if counted
        else float("nan")
    )


def standard_error(
    right: np.ndarray, families: np.ndarray, scene_of: np.ndarray, counted: Sequence[str]
) -> float:
    """Bootstrap standard error of `macro`."""
    return float(_resampled(right.astype(float), families, scene_of, counted).std())


def compare(
    mine: Any, other: Any, families: np.ndarray, scene_of: np.ndarray, counted: Sequence[str]
) -> dict[str, Any]:
    """The paired difference of two outcomes in points, its 95 % interval and standard error."""
    paired = mine.right.astype(float) - other.right.astype(float)
    drawn = 100 * _resampled(paired, families, scene_of, counted)
    low, high = np.percentile(drawn, [2.5, 97.5])
    value = 100 * macro(paired, families, counted)
    return {
        "difference": value,
        "low": float(low),
        "high": float(high),
        "standard_error": float(drawn.std()),
    }


def _resampled(
    values: np.ndarray, families: np.ndarray, scene_of: np.ndarray, counted: Sequence[str]
) -> np.ndarray:
    """The macro mean of `values` in each of the resamples of scenes."""
    scenes = int(scene_of.max()) + 1
    draws = (
        np.random.default_rng(11)
        .multinomial(scenes, np.full(scenes, 1 / scenes), _RESAMPLES)
        .astype(float)
    )
    means = []
    for family in counted:
        mask = families == family
        total = np.bincount(scene_of[mask], values[mask], scenes)
        count = np.bincount(scene_of[mask], minlength=scenes)
        means.append((draws @ total) / np.maximum(draws @ count, 1))
    return np.mean(means, 0) if means else np.full(_RESAMPLES, np.nan)
