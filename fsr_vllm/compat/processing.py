"""The steps of vLLM's multimodal processor and what they hand to one another."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

_INTERNAL_UUID = re.compile(r"renderer\d+-mm-\d+-image-\d+")


def stock_factories(model_class: type) -> Any:
    """The (info, processor, dummy_inputs) factories a vLLM model class was registered with.
    Attribute in 0.26-0.33.
    """
    return model_class._processor_factory  # type: ignore[attr-defined]


def mm_items_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The MultiModalDataItems among the arguments of `_apply_hf_processor_main`, whose signature
    changed twice.
    """
    from vllm.multimodal.parse import MultiModalDataItems

    return next(
        value for value in (*args, *kwargs.values()) if isinstance(value, MultiModalDataItems)
    )


def processed_data_of(result: Any) -> Any:
    """The BatchFeature in what `_apply_hf_processor_main` returns: a tuple until 0.28, the data
    itself since 0.30.
    """
    if not isinstance(result, tuple):
        return result
    from transformers import BatchFeature

    return next(value for value in result if isinstance(value, BatchFeature))


def image_hashes(inputs: Any, info: Any) -> tuple[dict[str, list[str]], list[str]]:
    """vLLM's identities of all media of a request, and the images' own, which say the same image
    alike.

    Why: `ProcessorInputs.get_mm_hashes` gained an argument in 0.28. And with both of vLLM's caches
    off the renderer names media after the request instead of hashing them
    (BaseRenderer._process_mm_uuids); for those images the second list hashes the content. Read in
    0.26-0.33, run in 0.32. Can go when a processor is told the content hash.
    """
    from dataclasses import replace

    from vllm.multimodal.processing import ProcessorInputs

    def hashes(of: Any) -> dict[str, list[str]]:
        arguments = [info.model_id]
        if "hash_algorithm" in inspect.signature(ProcessorInputs.get_mm_hashes).parameters:
            arguments.append(info.ctx.get_mm_config().mm_hasher_algorithm)
        return ProcessorInputs.get_mm_hashes(of, *arguments)

    found = hashes(inputs)
    uuids = (inputs.mm_uuid_items or {}).get("image") or []
    if not any(uuid and _INTERNAL_UUID.fullmatch(uuid) for uuid in uuids):
        return found, found["image"]
    own = [None if uuid and _INTERNAL_UUID.fullmatch(uuid) else uuid for uuid in uuids]
    return found, hashes(replace(inputs, mm_uuid_items={**inputs.mm_uuid_items, "image": own}))[
        "image"
    ]


def with_items(
    args: tuple[Any, ...], kwargs: dict[str, Any], items: Any
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of `_apply_hf_processor_main` for other items; its signature changed in 0.30
    and 0.31.
    """
    from vllm.multimodal.parse import MultiModalDataItems

    def swap(value: Any) -> Any:
        return items if isinstance(value, MultiModalDataItems) else value

    return [swap(value) for value in args], {name: swap(value) for name, value in kwargs.items()}


def hf_kwargs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, object]:
    """The processor options among those arguments: the mapping that follows the items."""
    from vllm.multimodal.parse import MultiModalDataItems

    values = [*args, *kwargs.values()]
    place = next(
        index for index, value in enumerate(values) if isinstance(value, MultiModalDataItems)
    )
    return values[place + 1]


def some_images(info: Any, items: Any, places: Sequence[int]) -> Any:
    """Items with only the images at `places`, made as vLLM's own processor cache makes them. Run in
    0.32.
    """
    data = {"image": [items["image"][place] for place in places]} if places else {}
    return info.parse_mm_data(data, validate=False)


def split_images(processed: Any, fields: Mapping[str, Any]) -> list[Any]:
    """One item per image of what the Hugging Face processor returned. Read in 0.26-0.33, run in
    0.32.
    """
    from vllm.multimodal.inputs import MultiModalKwargsItems

    return list(MultiModalKwargsItems.from_hf_inputs(processed, fields).get("image", []))


def join_images(items: Sequence[Any]) -> dict[str, Any]:
    """The inverse of `split_images`."""
    from vllm.multimodal.inputs import MultiModalKwargsItems

    return dict(MultiModalKwargsItems({"image": list(items)}).get_data())


def owned(item: Any) -> tuple[Any, int] | None:
    """An image's item with tensors of its own, not views of a batch, and its bytes; None if it
    cannot be kept.
    """
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


def wrap_dummy_inputs(processor: Any, plan: Callable[[Any], Any]) -> None:
    """Let `plan` have the profiling inputs of a processor that is not asked for them itself.

    Why: until 0.30 vLLM asks the processor's `dummy_inputs`; since 0.31 `get_dummy_inputs` is the
    processor's own. Run in 0.26, 0.30 and 0.32. Can go when the window begins at 0.31.
    """
    from vllm.multimodal.processing import BaseMultiModalProcessor

    if hasattr(BaseMultiModalProcessor, "get_dummy_inputs"):
        return
    stock = processor.dummy_inputs.get_dummy_processor_inputs
    processor.dummy_inputs.get_dummy_processor_inputs = lambda *args, **kwargs: plan(
        stock(*args, **kwargs)
    )
