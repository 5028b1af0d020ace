"""vLLM's processor hooks: exactly K placeholders per image, identities that say what was kept, and
the plan on its way to the model.

A plan rides on the items it belongs to, so that the processor itself keeps nothing of a request:
several renderer threads may be inside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs

from fsr_vllm.compat.attributes import RESULT_KEY
from fsr_vllm.compat.errors import as_request_errors
from fsr_vllm.compat.processing import (
    hf_kwargs_of,
    join_images,
    mm_items_of,
    owned,
    processed_data_of,
    some_images,
    split_images,
    with_items,
    wrap_dummy_inputs,
)
from fsr_vllm.compat.types import (
    Anything,
    Function,
    Inputs,
    Items,
    Processed,
    ProcessingInfo,
    Processor,
)
from fsr_vllm.engine.inputs import requested
from fsr_vllm.engine.pixel_cache import PixelCache
from fsr_vllm.engine.planned import (
    IMAGE,
    PLAN_FIELDS,
    FrontCounts,
    PlannedInputs,
    PlannedItems,
    plan_request,
    planned,
)
from fsr_vllm.engine.planning import Planner
from fsr_vllm.engine.wire import pack_plan
from fsr_vllm.methods import list_methods
from fsr_vllm.params import (
    Budget,
    FieldError,
    FsrRequest,
    ImagePlan,
    RequestFields,
    read_settings,
    served_methods,
)

if TYPE_CHECKING:
    from fsr_vllm.engine.families.base import Family


class FsrProcessorMixin(BaseMultiModalProcessor):
    """Stands before a model's stock processor; where nothing is pruned, every path is stock."""

    fsr_family: ClassVar[Family]

    def __init__(self, *args: Anything, **kwargs: Anything) -> None:
        """Arguments are vLLM's. Errors: as of `Planner`."""
        super().__init__(*args, **kwargs)
        self.fsr_planner: Planner | None = None
        self.fsr_pixels: PixelCache | None = None
        self._fsr_counts = FrontCounts()
        self.fsr_settings = settings = read_settings(self.info.get_hf_config())
        if settings is None or settings.unsupported is not None:
            return
        self.fsr_planner = Planner(settings, self.fsr_family, self.info)
        if settings.pixel_cache_bytes:
            self.fsr_pixels = PixelCache(settings.pixel_cache_bytes)
        wrap_dummy_inputs(self, self._profiled)

    def _hf_processor_applies_updates(self, *args: Anything, **kwargs: Anything) -> bool:
        """Asked until 0.28: Hugging Face's processor would write the unpruned placeholders."""
        stock = self.fsr_planner is None
        return stock and super()._hf_processor_applies_updates(*args, **kwargs)

    def get_dummy_inputs(self, *args: Anything, **kwargs: Anything) -> ProcessorInputs:
        """Inputs for profiling memory, asked for since 0.31."""
        return self._profiled(super().get_dummy_inputs(*args, **kwargs))

    def _profiled(self, inputs: ProcessorInputs) -> ProcessorInputs:
        """Profiling inputs, planned at the largest budget any request can have."""
        if self.fsr_planner is None:
            return inputs
        most: Budget = self.fsr_planner.settings.max_budget or "off"
        request = FsrRequest(RequestFields(fsr_budget=most))
        return planned(self.fsr_planner, inputs, request, dummy=True)

    def apply(self, inputs: Inputs, *args: Anything, **kwargs: Anything) -> Anything:
        """Process one prompt; the result says what was kept of its images."""
        if not isinstance(inputs, PlannedInputs):
            with as_request_errors(FieldError):
                request = requested(self.info.ctx.model_config, inputs.hf_processor_mm_kwargs)
                if self.fsr_planner is not None:
                    inputs = plan_request(self.fsr_planner, inputs, request)
        result = super().apply(inputs, *args, **kwargs)
        if isinstance(inputs, PlannedInputs) and inputs.fsr is not None and not inputs.fsr.dummy:
            result[RESULT_KEY] = inputs.fsr.report()
            self._fsr_counts.add_plans(inputs.fsr)
        return result

    def _get_cache_missing_items(
        self, cache: Anything, mm_data_items: Items, mm_hashes: Anything
    ) -> tuple[Anything, Items]:
        is_cached, missing = super()._get_cache_missing_items(cache, mm_data_items, mm_hashes)
        if isinstance(mm_data_items, PlannedItems):
            places = {
                modality: [place for place, cached in enumerate(each) if not cached]
                for modality, each in is_cached.items()
            }
            missing = PlannedItems(missing, mm_data_items.fsr.at(places))
        return is_cached, missing

    def _apply_hf_processor_main(self, *args: Anything, **kwargs: Anything) -> Processed:
        items = mm_items_of(args, kwargs)
        if not isinstance(items, PlannedItems) or not items.fsr.plans:
            return super()._apply_hf_processor_main(*args, **kwargs)
        result = self._preprocess(items, args, kwargs)
        data = processed_data_of(result)
        for modality, plans in items.fsr.plans.items():
            pairs = zip(items.fsr.keys[modality], plans, strict=True)
            data[PLAN_FIELDS[modality]] = [pack_plan(key, plan) for key, plan in pairs]
        return result

    def _preprocess(
        self, items: PlannedItems, args: tuple[Anything, ...], kwargs: dict[str, Anything]
    ) -> Processed:
        """The stock step for images whose pixels are not cached; its result is of all images."""
        stock, cache = super()._apply_hf_processor_main, self.fsr_pixels
        counted = 0 if items.fsr.dummy else sum(map(len, items.fsr.plans.values()))
        keys = [key for key in items.fsr.keys.get(IMAGE, ()) if key is not None]
        if cache is None or set(items) != {IMAGE} or len(keys) < len(items[IMAGE]):
            self._fsr_counts.add(preprocessed_images=counted)
            return stock(*args, **kwargs)
        found, places = cache.look_up(keys)
        self._fsr_counts.add(preprocessed_images=len(places))
        if len(places) < len(keys):
            positional, kwargs = with_items(args, kwargs, some_images(self.info, items, places))
            args = tuple(positional)
        result = stock(*args, **kwargs)
        data = processed_data_of(result)
        fields = super()._get_mm_fields_config(data, hf_kwargs_of(args, kwargs))
        for place, item in zip(places, split_images(data, fields), strict=True):
            found[keys[place]] = item
            if (kept := owned(item)) is not None:
                cache.put(keys[place], *kept)
        if len(places) < len(keys):
            data.update(join_images([found[key] for key in keys]))
        return result

    def _get_mm_fields_config(
        self, hf_inputs: Processed, hf_kwargs: Mapping[str, object]
    ) -> dict[str, MultiModalFieldConfig]:
        configs = dict(super()._get_mm_fields_config(hf_inputs, hf_kwargs))
        for modality, name in PLAN_FIELDS.items():
            if name in hf_inputs:
                # Read by Python in the worker: on the device it would cost a synchronisation per
                # batch.
                configs[name] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        return configs

    def _get_prompt_updates(
        self, mm_items: Items, *args: Anything, **kwargs: Anything
    ) -> Sequence[Anything]:
        updates = super()._get_prompt_updates(mm_items, *args, **kwargs)
        if not isinstance(mm_items, PlannedItems):
            return updates
        plans = mm_items.fsr.plans
        return [
            self._shortened(update, plans[update.modality]) if update.modality in plans else update
            for update in updates
        ]

    def _shortened(self, update: Anything, plans: Sequence[ImagePlan]) -> Anything:
        stock = update.replacement

        def replacement(index: int) -> Anything:
            placeholder, plan = stock(index) if callable(stock) else stock, plans[index]
            return self.fsr_family.shorten(placeholder, plan) if plan.pruned else placeholder

        return dataclasses.replace(update, replacement=replacement)

    def fsr_stats(self) -> dict[str, int]:
        """What this front end was asked for and preprocessed, with the pixel cache's pixel_*."""
        pixels = {} if self.fsr_pixels is None else self.fsr_pixels.stats()
        return self._fsr_counts.all() | pixels

    def fsr_methods(self) -> list[str]:
        """The methods a request may name: servable ones whose inputs this model can give."""
        if self.fsr_planner is None:
            return []
        given, known = self.fsr_planner.signals, list_methods()
        return [name for name in served_methods() if given.issuperset(known[name].needs)]


def processor_factory(stock: Function, family: Family) -> Function:
    """A factory for vLLM's registry: the stock processor of this checkpoint with ours before it."""

    def build(info: ProcessingInfo, dummy_inputs: Anything, **more: Anything) -> Processor:
        # `more` is `cache`, until 0.30.
        kind = type(stock(info, dummy_inputs, **more))
        ours = type(f"Fsr{kind.__name__}", (FsrProcessorMixin, kind), {"fsr_family": family})
        return ours(info, dummy_inputs, **more)

    return build
