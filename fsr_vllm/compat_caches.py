"""The part of `compat` that concerns caches: identities of images, what becomes of them, and vLLM's
own resets.

Same rules as there: each entry says why it is needed, in which versions it was read or run, and
when it can go.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

_INTERNAL_UUID = re.compile(r"renderer\d+-mm-\d+-image-\d+")
_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
_forget: weakref.WeakSet[Any] = weakref.WeakSet()


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


def wrap_mm_cache_reset(clear: Callable[[Any], None]) -> None:
    """Call `clear(processor)` whenever a front end clears its multimodal cache; safe to call twice.

    Why: `BaseRenderer.clear_mm_cache` is where /reset_mm_cache, sleep and pause end in the front
    end, whichever processor cache is in use, none included. To be called before a renderer is made,
    which binds the method. Run in 0.32; where the method does not exist (it was elsewhere in older
    versions) nothing is wrapped. Can go when a processor is told of resets.
    """
    from vllm.renderers import base

    cls = base.BaseRenderer
    stock = getattr(cls, "clear_mm_cache", None)
    if stock is None or getattr(cls, "_fsr_resets", False):
        return

    @functools.wraps(stock)
    def clear_mm_cache(self: Any) -> Any:
        result = stock(self)
        clear(getattr(self, "mm_processor", None))
        return result

    cls.clear_mm_cache = clear_mm_cache
    cls._fsr_resets = True


def on_runner_reset(model: Any) -> None:
    """Have `model.fsr_forget()` called whenever this worker's runner drops encoder outputs or
    multimodal caches.

    Why: `reset_encoder_cache` and `reset_mm_cache` of the model runner are where vLLM's resets,
    sleep, pause and reload_weights end in a worker, and none reaches the model. Wrapped on the
    classes of both runners, of which one is already imported when a model is made. Run in 0.32. Can
    go when a model is told of resets.
    """
    _forget.add(model)
    for module in _RUNNERS:
        cls = getattr(sys.modules.get(module), "GPUModelRunner", None)
        if cls is None or getattr(cls, "_fsr_resets", False):
            continue
        for name in ("reset_encoder_cache", "reset_mm_cache"):
            setattr(cls, name, _and_forget(getattr(cls, name)))
        cls._fsr_resets = True


def _and_forget(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def reset(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, *args, **kwargs)
        for model in list(_forget):
            model.fsr_forget()
        return result

    return reset


def has_vision_tower() -> bool:
    """Whether this pipeline rank runs the vision tower: the first one does."""
    from vllm.distributed import get_pp_group

    return get_pp_group().is_first_rank


def front_end(app: Any) -> tuple[Any, Any]:
    """The model config of an API server and its multimodal processor, None where the model has
    none.

    Why: the app's `state` holds what its routes work with; a server that only renders has no
    `engine_client`, but an `online_renderer`. Read and run in 0.32. Can go when vLLM hands both to
    endpoint plugins.
    """
    client = getattr(app.state, "engine_client", None)
    renderer = client.renderer if client is not None else app.state.online_renderer.renderer
    return renderer.model_config, getattr(renderer, "mm_processor", None)


def engine_has_died(client: Any) -> bool:
    """Whether nothing that is sent to the engine will be answered any more.

    Why: a call that is sent to a dead engine is waited for without end, and keeps the process from
    exiting. `errored` is what vLLM's own /health and watchdog read. Run in 0.32. Can go when such
    calls fail.
    """
    return bool(client.errored)


async def ask_workers(client: Any, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
    """A method of every worker of every data-parallel engine.

    Why: `collective_rpc` asks all engines and returns the first one's answer alone. The client's
    `core_engines` and `_call_utility_async` were read in 0.27, 0.30 and 0.32, run in 0.32. Can go
    when it returns all answers.
    """
    core = client.engine_core
    engines = getattr(core, "core_engines", None) or []
    if len(engines) < 2:
        return await client.collective_rpc(method, args=args)
    calls = (
        core._call_utility_async("collective_rpc", method, None, args, None, engine=each)
        for each in engines
    )
    return [worker for workers in await asyncio.gather(*calls) for worker in workers]
