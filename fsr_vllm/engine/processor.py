"""vLLM's processor hooks: exactly K placeholders per image, identities that say what was kept, and
the plan on its way to the model.

A plan rides on the items it belongs to, so that the processor itself keeps nothing of a request:
several renderer threads may be inside it.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ProcessorBatchItems
from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs

from fsr_vllm.compat.attributes import RESULT_KEY
from fsr_vllm.compat.embeddings import embedding_rows
from fsr_vllm.compat.errors import request_error
from fsr_vllm.compat.identity import RESERVED, reserved_uuid
from fsr_vllm.compat.processing import (
    hf_kwargs_of,
    image_hashes,
    join_images,
    mm_items_of,
    owned,
    processed_data_of,
    some_images,
    split_images,
    with_items,
    wrap_dummy_inputs,
)
from fsr_vllm.engine.embeddings import plan_embeddings
from fsr_vllm.engine.inputs import as_request_errors, requested
from fsr_vllm.engine.pixel_cache import PixelCache
from fsr_vllm.engine.planned import PLAN_FIELDS, PlannedInputs, PlannedItems, Plans
from fsr_vllm.engine.planning import Planner
from fsr_vllm.engine.wire import image_key, pack_plan
from fsr_vllm.methods import list_methods
from fsr_vllm.params import (
    FsrRequest,
    ImagePlan,
    Report,
    RequestFields,
    read_settings,
    served_methods,
    shown,
    without_fields,
)

if TYPE_CHECKING:
    from fsr_vllm.engine.families.base import Family

_IMAGE = "image"  # the modality of which preprocessed items are kept, and that may be embeddings


class FsrProcessorMixin(BaseMultiModalProcessor):
    """Stands before a model's stock processor; where nothing is pruned every path is the stock one."""

    fsr_family: ClassVar[Family]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fsr_planner: Planner | None = None
        self.fsr_pixels: PixelCache | None = None
        self._fsr_counts: Counter[str] = Counter()
        self._fsr_lock = threading.Lock()
        settings = read_settings(self.info.get_hf_config())
        if settings is None or settings.unsupported is not None:
            return
        self.fsr_planner = Planner(settings, self.fsr_family, self.info)
        if settings.pixel_cache_bytes:
            self.fsr_pixels = PixelCache(settings.pixel_cache_bytes)
        wrap_dummy_inputs(self, self._profiled)

    # Steps of vLLM's processor, in order
    # -------------------------------------------------------------------------

    def _hf_processor_applies_updates(self, *args: Any, **kwargs: Any) -> bool:
        """Asked until 0.28: Hugging Face's processor would write the unpruned number of
        placeholders.
        """
        stock = self.fsr_planner is None
        return stock and super()._hf_processor_applies_updates(*args, **kwargs)

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """Inputs for profiling memory, asked for since 0.31."""
        return self._profiled(super().get_dummy_inputs(*args, **kwargs))

    def _profiled(self, inputs: ProcessorInputs) -> ProcessorInputs:
        """Profiling inputs, planned at the largest budget any request can have."""
        if self.fsr_planner is None:
            return inputs
        most = self.fsr_planner.settings.max_budget or "off"
        return self._planned(inputs, FsrRequest(RequestFields(fsr_budget=most)), dummy=True)

    def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
        """Process one prompt; the result says what was kept of its images."""
        if not isinstance(inputs, PlannedInputs):
            with as_request_errors():
                inputs = self._plan_request(inputs)
        result = super().apply(inputs, *args, **kwargs)
        if isinstance(inputs, PlannedInputs) and inputs.fsr is not None and not inputs.fsr.dummy:
            result[RESULT_KEY] = self._counted(inputs.fsr)
        return result

    def _get_cache_missing_items(self, cache: Any, mm_data_items: Any, mm_hashes: Any) -> Any:
        is_cached, missing = super()._get_cache_missing_items(cache, mm_data_items, mm_hashes)
        if isinstance(mm_data_items, PlannedItems):
            places = {
                modality: [place for place, cached in enumerate(each) if not cached]
                for modality, each in is_cached.items()
            }
            missing = PlannedItems(missing, mm_data_items.fsr.at(places))
        return is_cached, missing

    def _apply_hf_processor_main(self, *args: Any, **kwargs: Any) -> Any:
        items = mm_items_of(args, kwargs)
        if not isinstance(items, PlannedItems) or not items.fsr.plans:
            return super()._apply_hf_processor_main(*args, **kwargs)
        result = self._preprocess(items, args, kwargs)
        data = processed_data_of(result)
        for modality, plans in items.fsr.plans.items():
            pairs = zip(items.fsr.keys[modality], plans, strict=True)
            data[PLAN_FIELDS[modality]] = [pack_plan(key, plan) for key, plan in pairs]
        return result

    def _preprocess(self, items: PlannedItems, args: tuple[Any, ...], kwargs: Any) -> Any:
        """The stock step for images whose pixels are not in the cache, and all images in their
        order as its result.
        """
        keys, cache = items.fsr.keys.get(_IMAGE, ()), self.fsr_pixels
        stock = super()._apply_hf_processor_main
        if cache is None or not all(keys) or set(items) != {_IMAGE}:
            self._count_preprocessed(sum(map(len, items.fsr.plans.values())), items.fsr.dummy)
            return stock(*args, **kwargs)
        found = {key: cache.get(key) for key in dict.fromkeys(keys) if key is not None}
        # An image that stands twice in a prompt is preprocessed once.
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        places = [place for place, key in enumerate(keys) if found[key] is None and first[key] == place]
        self._count_preprocessed(len(places), items.fsr.dummy)
        if len(places) < len(keys):
            args, kwargs = with_items(args, kwargs, some_images(self.info, items, places))
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

    def _get_mm_fields_config(self, hf_inputs: Any, hf_kwargs: Mapping[str, object]) -> Any:
        configs = dict(super()._get_mm_fields_config(hf_inputs, hf_kwargs))
        for modality, name in PLAN_FIELDS.items():
            if name in hf_inputs:
                # Read by Python in the worker: on the device it would cost a synchronisation per
                # batch.
                configs[name] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        return configs

    def _get_prompt_updates(self, mm_items: Any, *args: Any, **kwargs: Any) -> Any:
        updates = super()._get_prompt_updates(mm_items, *args, **kwargs)
        if not isinstance(mm_items, PlannedItems):
            return updates
        plans = mm_items.fsr.plans
        return [
            self._shortened(update, plans[update.modality]) if update.modality in plans else update
            for update in updates
        ]

    def _shortened(self, update: Any, plans: Sequence[ImagePlan]) -> Any:
        stock = update.replacement

        def replacement(index: int) -> Any:
            placeholder, plan = stock(index) if callable(stock) else stock, plans[index]
            return self.fsr_family.shorten(placeholder, plan) if plan.pruned else placeholder

        return dataclasses.replace(update, replacement=replacement)

    # From vLLM's inputs to planned ones
    # -------------------------------------------------------------------------

    def _plan_request(self, inputs: ProcessorInputs) -> ProcessorInputs:
        """A request's inputs as they are to be processed. Errors: FieldError, or vLLM's own."""
        request = requested(self.info.ctx.model_config, inputs.hf_processor_mm_kwargs)
        planner = self.fsr_planner
        if planner is None:
            return inputs
        if (uuid := reserved_uuid(inputs)) is not None:
            # It would be another image's identity, of another number of rows.
            raise request_error(
                f"uuid must not begin with {RESERVED!r}, as the server's own identities do; "
                f"got {shown(uuid)}",
                "uuid",
            )
        request = request or FsrRequest(RequestFields())
        images = inputs.mm_data_items.get(_IMAGE)
        if images is None or isinstance(images, ProcessorBatchItems):
            return self._planned(inputs, request)
        kept = plan_embeddings(request.fields, planner.settings, embedding_rows(images))
        return PlannedInputs.of(_bare(inputs), Plans({_IMAGE: kept}, {}))

    def _planned(
        self, inputs: ProcessorInputs, request: FsrRequest, dummy: bool = False
    ) -> ProcessorInputs:
        """Inputs with a plan per item; FieldError if what the client asked for cannot be."""
        planner, inputs = self.fsr_planner, _bare(inputs)
        assert planner is not None
        media = {name: inputs.mm_data_items[name] for name in PLAN_FIELDS if name in inputs.mm_data_items}
        if not media:
            return inputs
        plans, by_load = {}, None
        for modality, items in media.items():
            plans[modality], by_load = planner.plan(request, items, inputs.hf_processor_mm_kwargs)
        hashes, images = image_hashes(inputs, self.info)
        settings = planner.settings
        keys: dict[str, list[bytes | None]] = {name: [None] * len(some) for name, some in plans.items()}
        if _IMAGE in plans and not dummy and (settings.pixel_cache_bytes or settings.feature_cache_bytes):
            keys[_IMAGE] = [image_key(image) for image in images]
        identities = {name: planner.identities(hashes[name], some) for name, some in plans.items()}
        planned = Plans(plans, keys, dummy, {**hashes, **identities}, by_load)
        inputs.mm_data_items = PlannedItems(inputs.mm_data_items, planned)
        return PlannedInputs.of(inputs, planned)

    # What this front end tells
    # -------------------------------------------------------------------------

    def fsr_stats(self) -> dict[str, int]:
        """What this front end was asked for and what it preprocessed, with the pixel cache's
        pixel_*.
        """
        pixels = self.fsr_pixels.stats() if self.fsr_pixels is not None else {}
        with self._fsr_lock:
            return {name: self._fsr_counts[name] for name in _COUNTED} | pixels

    def fsr_methods(self) -> list[str]:
        """The methods a request may name here: those that can be served, and have their inputs in
        this model.
        """
        if self.fsr_planner is None:
            return []
        given, known = self.fsr_planner.signals, list_methods()
        return [name for name in served_methods() if given.issuperset(known[name].needs)]

    def _counted(self, planned: Plans) -> Report:
        plans, report = [plan for some in planned.plans.values() for plan in some], planned.report()
        with self._fsr_lock:
            self._fsr_counts["images"] += len(plans)
            self._fsr_counts["pruned_images"] += sum(plan.pruned for plan in plans)
            self._fsr_counts["visual_tokens_kept"] += report.kept
            self._fsr_counts["visual_tokens_total"] += report.total
        return report

    def _count_preprocessed(self, count: int, dummy: bool) -> None:
        """Images that go to the Hugging Face processor, those of the warm-up left out."""
        with self._fsr_lock:
            self._fsr_counts["preprocessed_images"] += 0 if dummy else count


_COUNTED = (
    "images", "pruned_images", "visual_tokens_kept", "visual_tokens_total", "preprocessed_images",
)  # fmt: skip


def _bare(inputs: ProcessorInputs) -> ProcessorInputs:
    """The same without our fields, which are neither the Hugging Face processor's nor hash factors."""
    return dataclasses.replace(
        inputs, hf_processor_mm_kwargs=without_fields(inputs.hf_processor_mm_kwargs)
    )


def processor_factory(stock: Callable[..., Any], family: Family) -> Any:
    """A factory for vLLM's registry: the stock processor of this checkpoint with ours before it."""

    def build(info: Any, dummy_inputs: Any, **more: Any) -> Any:  # until 0.30 also `cache`
        kind = type(stock(info, dummy_inputs, **more))
        ours = type(f"Fsr{kind.__name__}", (FsrProcessorMixin, kind), {"fsr_family": family})
        return ours(info, dummy_inputs, **more)

    return build
