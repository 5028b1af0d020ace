"""The steps of vLLM's multimodal processor and what they hand to one another."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from fsr_vllm.compat.patching import Entry, Patch
from fsr_vllm.compat.types import (
    Anything,
    Function,
    Inputs,
    Items,
    KwargsItem,
    Processed,
    ProcessingInfo,
    Processor,
)

Arguments: TypeAlias = tuple[Anything, ...]

_INTERNAL_UUID = re.compile(r"renderer\d+-mm-\d+-image-\d+")
FACTORIES = Entry(
    "vllm.model_executor.models.llava:LlavaForConditionalGeneration._processor_factory",
    "The (info, processor, dummy_inputs) factories that a model class was registered with: ours "
    "are built on them.",
    "the registry hands them out",
)
MAIN_STEP = Entry(
    "vllm.multimodal.processing:BaseMultiModalProcessor._apply_hf_processor_main",
    "The Hugging Face processor's step, which known images pass by. Its signature changed in 0.30 "
    "and 0.31: items and options are found among the arguments by their kind, and the result is "
    "the data itself since 0.30, before that a tuple.",
    "a processor is told the plan of its items",
    signature="(self, *, mm_items, hf_kwargs)",
)
MISSING_ITEMS = Entry(
    "vllm.multimodal.processing:BaseMultiModalProcessor._get_cache_missing_items",
    "Plans go along with the images that vLLM's processor cache does not hold.",
    "a processor is told the plan of its items",
    signature="(self, cache, mm_data_items, mm_hashes)",
)
PROMPT_UPDATES = Entry(
    "vllm.multimodal.processing:BaseMultiModalProcessor._get_prompt_updates",
    "Where placeholders are made, and shortened.",
    "never: vLLM's models override it",
    signature="(self, mm_items)",
)
HASHES = Entry(
    "vllm.multimodal.processing:ProcessorInputs.get_mm_hashes",
    "Identities of media; it gained an argument in 0.28. With both of vLLM's caches off the "
    "renderer names media after the request instead of hashing them; their content is hashed "
    "here, so that the same image is known again.",
    "a processor is told the content hash",
    signature="(self, model_id)",
)
ITEMS = Entry(
    "vllm.multimodal.inputs:MultiModalKwargsItems.from_hf_inputs",
    "Takes what the Hugging Face processor returned apart, image by image, for the pixel cache.",
    "vLLM's processor cache is keyed by the image alone",
    signature="(hf_inputs, config_by_key)",
)
DUMMY_INPUTS = Patch(
    "vllm.multimodal.processing:BaseDummyInputsBuilder.get_dummy_processor_inputs",
    "Until 0.30 vLLM asks the processor's `dummy_inputs` for the inputs of its profiling run; "
    "since 0.31 `get_dummy_inputs` is the processor's own.",
    "the window begins at 0.31",
    run="0.26, 0.30, 0.32",
    missing="since 0.31",
)


def stock_factories(model_class: type) -> Anything:
    """The (info, processor, dummy_inputs) factories a vLLM model class was registered with."""
    return model_class._processor_factory  # type: ignore[attr-defined]


def _items_among(values: Sequence[Anything]) -> int:
    from vllm.multimodal.parse import MultiModalDataItems

    return next(
        place for place, value in enumerate(values) if isinstance(value, MultiModalDataItems)
    )


def mm_items_of(args: Arguments, kwargs: dict[str, Anything]) -> Items:
    """The MultiModalDataItems among the arguments of `_apply_hf_processor_main`."""
    values = [*args, *kwargs.values()]
    return values[_items_among(values)]


def hf_kwargs_of(args: Arguments, kwargs: dict[str, Anything]) -> Mapping[str, object]:
    """The processor options among those arguments: the mapping that follows the items."""
    values = [*args, *kwargs.values()]
    return values[_items_among(values) + 1]


def with_items(
    args: Arguments, kwargs: dict[str, Anything], items: Items
) -> tuple[list[Anything], dict[str, Anything]]:
    """Those arguments for other items."""
    before = mm_items_of(args, kwargs)

    def swap(value: Anything) -> Anything:
        return items if value is before else value

    return [swap(value) for value in args], {name: swap(value) for name, value in kwargs.items()}


def processed_data_of(result: Processed) -> Processed:
    """The BatchFeature in what `_apply_hf_processor_main` returns."""
    if not isinstance(result, tuple):
        return result
    from transformers import BatchFeature

    return next(value for value in result if isinstance(value, BatchFeature))


def image_hashes(inputs: Inputs, info: ProcessingInfo) -> tuple[dict[str, list[str]], list[str]]:
    """The identities that vLLM gives all media of a request, and the images' own, by which the
    same image is known again: its uuid or its content, never the name of a request.
    """
    from dataclasses import replace

    from vllm.multimodal.processing import ProcessorInputs

    def hashes(of: Inputs) -> dict[str, list[str]]:
        arguments = [info.model_id]
        if "hash_algorithm" in inspect.signature(ProcessorInputs.get_mm_hashes).parameters:
            arguments.append(info.ctx.get_mm_config().mm_hasher_algorithm)
        return ProcessorInputs.get_mm_hashes(of, *arguments)

    found = hashes(inputs)
    uuids = (inputs.mm_uuid_items or {}).get("image") or []
    if not any(uuid and _INTERNAL_UUID.fullmatch(uuid) for uuid in uuids):
        return found, found["image"]
    own = [None if uuid and _INTERNAL_UUID.fullmatch(uuid) else uuid for uuid in uuids]
    renamed = replace(inputs, mm_uuid_items={**inputs.mm_uuid_items, "image": own})
    return found, hashes(renamed)["image"]


def some_images(info: ProcessingInfo, items: Items, places: Sequence[int]) -> Items:
    """Items with only the images at `places`, made as vLLM's own processor cache makes them."""
    data = {"image": [items["image"][place] for place in places]} if places else {}
    return info.parse_mm_data(data, validate=False)


def split_images(processed: Processed, fields: Mapping[str, Anything]) -> list[KwargsItem]:
    """One item per image of what the Hugging Face processor returned."""
    from vllm.multimodal.inputs import MultiModalKwargsItems

    return list(MultiModalKwargsItems.from_hf_inputs(processed, fields).get("image", []))


def join_images(items: Sequence[KwargsItem]) -> dict[str, Anything]:
    """The inverse of `split_images`."""
    from vllm.multimodal.inputs import MultiModalKwargsItems

    return dict(MultiModalKwargsItems({"image": list(items)}).get_data())


def owned(item: KwargsItem) -> tuple[KwargsItem, int] | None:
    """An image's item without views of a batch, and its bytes; None if it cannot be kept."""
    from dataclasses import replace

    kept, size = {}, 0
    for name, element in item.items():
        data = element.data
        if not isinstance(data, torch.Tensor) or data.device.type != "cpu":
            return None
        if data.untyped_storage().nbytes() > data.nbytes:
            data = data.clone()
        kept[name] = replace(element, data=data)
        size += data.nbytes
    return type(item)(kept), size


def wrap_dummy_inputs(processor: Processor, plan: Callable[[Inputs], Inputs]) -> None:
    """Let `plan` have the profiling inputs of a processor that is not asked for them itself."""
    from vllm.multimodal.processing import BaseMultiModalProcessor

    if hasattr(BaseMultiModalProcessor, "get_dummy_inputs"):
        return

    def make(stock: Function) -> Function:
        return lambda *args, **kwargs: plan(stock(*args, **kwargs))

    DUMMY_INPUTS.apply(make, owner=processor.dummy_inputs)
