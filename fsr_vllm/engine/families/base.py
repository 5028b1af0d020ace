"""The protocol of a model family: what the plugin has to know about a model that it prunes.

A family has two halves. The front half answers for a checkpoint in processes that hold no model: it
imports no model code. The worker half is made with the model and stands between vLLM's inputs and
the rows that methods see. `factory` builds the vLLM classes from both; docs/adding-a-family.md says
how to write one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fsr_vllm.compat.types import (
    EngineArgs,
    HfConfig,
    Items,
    Model,
    Placeholder,
    ProcessingInfo,
    VllmConfig,
)

if TYPE_CHECKING:
    from torch import Tensor

    from fsr_vllm.engine.attention_hook import AttentionHook, AttentionLayout
    from fsr_vllm.engine.types import EncodedImage, ImageFeatures, ImageInput
    from fsr_vllm.methods import PrunedTokens
    from fsr_vllm.params import ImagePlan

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the original image


class Family(ABC):
    """The front half: facts about checkpoints of one architecture."""

    architecture: ClassVar[str]  # as vLLM registers it
    signals: ClassVar[frozenset[str]]  # fields of VisualTokens that the worker half can fill
    one_size: ClassVar[bool] = False  # whether every image has `most_tokens`, whatever its size

    @abstractmethod
    def stock_class(self) -> type:
        """The model class of vLLM, imported when it is needed."""

    @abstractmethod
    def worker_half(self) -> type[WorkerHalf]:
        """The class of the worker half, imported when it is needed."""

    def model_mixins(self) -> tuple[type, ...]:
        """More bases of the generated model class, before the stock one."""
        return ()

    @abstractmethod
    def unsupported(self, hf_config: HfConfig) -> str | None:
        """Why this checkpoint's images cannot be pruned, or None."""

    def conflicts(self, engine_args: EngineArgs) -> str | None:
        """Which of vLLM's options the plugin cannot work with on this family and why, or None."""
        return None

    @abstractmethod
    def most_tokens(self, hf_config: HfConfig) -> int:
        """The most visual tokens that an image can have."""

    @abstractmethod
    def total(
        self, info: ProcessingInfo, images: Items, index: int, options: Mapping[str, Any]
    ) -> int | None:
        """Visual tokens N of an image without pruning.

        `info` is vLLM's processing info and `options` are the processor's. An image may come
        without its pixels, where vLLM has it cached under a `uuid`: None where N is not known then.
        """

    def shorten(self, placeholder: Placeholder, plan: ImagePlan) -> Placeholder:
        """The placeholder of a pruned image, cut from the stock one: exactly `plan.keep` tokens."""
        return placeholder[: plan.keep]

    @abstractmethod
    def boxes(self, info: ProcessingInfo, size: tuple[int, int]) -> Sequence[Box | None]:
        """The part of the original image, `size` = (width, height) pixels, that each row shows;
        None for a row that shows nothing of it, such as a newline.
        """


class WorkerHalf(ABC):
    """The worker half, made with the model: images in, rows out."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.hook: AttentionHook  # set by Pruner, once the layout's layers are hooked

    @staticmethod
    def prepare(vllm_config: VllmConfig) -> None:
        """Run before the stock model's `__init__`."""
        return

    @abstractmethod
    def attention_layout(self) -> AttentionLayout:
        """The attention layers of the vision tower, and how their rows belong to images."""

    @abstractmethod
    def inputs(self, kwargs: Mapping[str, Any], plans: Sequence[Tensor]) -> list[ImageInput]:
        """One ImageInput per image of `embed_multimodal`'s input, with what `pack_plan` made."""

    @abstractmethod
    def features(self, images: Sequence[ImageInput], wanted: frozenset[str]) -> list[ImageFeatures]:
        """Run the tower over distinct images; `self.hook` reads the `wanted` signals."""

    @abstractmethod
    def rows(self, features: Sequence[ImageFeatures], wanted: frozenset[str]) -> list[EncodedImage]:
        """Rows and signals as methods see them; equal images make equal rows, whatever is beside
        them.

        `wanted` are the fields of VisualTokens that some method of the batch reads.
        """

    def place(self, image: EncodedImage, per_patch: Tensor) -> Tensor:
        """Values per patch (P,) as values per row (N,), by the same merge as the rows."""
        return per_patch

    def finish(self, image: EncodedImage, pruned: PrunedTokens | None) -> Tensor:
        """The rows vLLM gets for the image: the K kept ones, or all N where it is not pruned.

        A copy in the second case: vLLM keeps rows image by image, and a view would keep the memory
        of the whole batch alive.
        """
        return image.rows.clone() if pruned is None else pruned.tokens
