"""Images that are cut into tiles: how vLLM joins the tiles' patches to one sequence of rows."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

from fsr_vllm.compat.patching import Entry
from fsr_vllm.compat.types import Model, ProcessingInfo

if TYPE_CHECKING:
    from torch import Tensor

MERGE = Entry(
    "vllm.model_executor.models.llava_next:"
    "LlavaNextForConditionalGeneration._merge_image_patch_embeddings",
    "Puts the patches of an image's tiles in order, without padding and with a newline row behind "
    "each row of the grid. It reads `config` and `image_newline` of its `self` and works at any "
    "width: whatever is known of patches goes the same way as their rows.",
    "the model tells which tile and patch a row is",
    signature="(self, image_size, patch_embeddings, *, strategy)",
)
COUNT = Entry(
    "vllm.model_executor.models.llava_next:LlavaNextProcessingInfo.get_num_image_tokens",
    "The number of placeholders of an unpruned image of this size.",
    "never: vLLM's processors call it",
    signature="(self, *, image_width, image_height)",
)


def merged(
    model: Model, size: Sequence[int], per_patch: Tensor, newline: Tensor, strategy: str
) -> Tensor:
    """Values per patch (T, P, C) of an image's T tiles as values per row (N, C).

    The stock model's own merge, with `newline` (C,) where its rows have the newline. `size` is
    (height, width) of the original image in pixels.
    """
    import torch

    stand_in = SimpleNamespace(config=model.config, image_newline=newline)
    merge = type(model)._merge_image_patch_embeddings
    return merge(stand_in, torch.tensor(list(size)), per_patch, strategy=strategy)


def stock_tokens(info: ProcessingInfo, size: tuple[int, int]) -> int:
    """Placeholders of an unpruned image of `size` = (width, height) pixels."""
    width, height = size
    return int(info.get_num_image_tokens(image_width=width, image_height=height))
