"""VisionDrop, the stage before the language model: VisionZip with other shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Fidelity, option
from .visionzip import VisionZip


@dataclass
class VisionDrop(VisionZip):
    """VisionZip's rule with VisionDrop's shares: all of VisionDrop that runs before the language
    model.

    Its further stages, after layers 8, 16 and 24 of the language model, score tokens by what visual
    tokens attend to each other, and need a number of tokens that changes from layer to layer: they
    are left out, so results are VisionZip's, not those published for VisionDrop. The default share
    is that of the authors' setting for 32 tokens on average, whose first stage keeps 42 dominant
    and 6 contextual rows; that stage keeps 1.5 times the average (3 times for video), so an average
    of 32 corresponds to K = 48 here.
    """

    name: ClassVar[str] = "visiondrop"
    paper: ClassVar[str] = (
        "Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment (arXiv 2506.22283)"
    )
    license: ClassVar[str] = "Apache-2.0"
    fidelity: ClassVar[Fidelity] = "stage-1"

    contextual_share: float = option(
        6 / 48, low=0, high=1, doc="share of K for contextual (merged) rows"
    )
