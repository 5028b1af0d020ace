"""Exactly K placeholders per image, cache identities that say what was kept, and the plan on its
way to the model.

A plan rides on the item list it belongs to (`MultiModalDataItems.fsr_plans`, beside the images'
cache keys in `fsr_keys`), so that the processor itself stays stateless: several renderer threads
may be inside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs

from fsr_vllm.compat.attributes import ADAPTIVE_KEY, RESULT_KEY
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
from fsr_vllm.compat.version import why_inactive
from fsr_vllm.engine.conversation import DERIVED_KEY, Derived, completed
from fsr_vllm.engine.embeddings import plan_embeddings
from fsr_vllm.engine.families.base import Family
from fsr_vllm.engine.pixel_cache import PixelCache
from fsr_vllm.engine.planning import PlannedInputs, prototype_file, read_settings
from fsr_vllm.engine.wire import PLAN_FIELD, image_key, pack_plan
from fsr_vllm.methods import list_methods
from fsr_vllm.params import (
    HOW_TO_ACTIVATE,
    PREFIX,
    FieldError,
    ImagePlan,
    RequestFields,
    resolve,
    served_methods,
    shown,
)
from fsr_vllm.params.misplaced import misspelt


class FsrProcessorMixin(BaseMultiModalProcessor):
    """Before a model family's stock processor; without settings every path is the stock one."""

    fsr_unsupported: str | None = (
        None  # why this model's images cannot be pruned; also read by the HTTP side
    )
    fsr_signals: frozenset[str] = (
        frozenset()
    )  # VisualTokens fields the family's model side can fill

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fsr_settings = read_settings(self.info.get_hf_config())
        wrap_dummy_inputs(self, self._profiled)
        self.fsr_counts = {
            "images": 0,
            "pruned_images": 0,
            "visual_tokens_kept": 0,
            "visual_tokens_total": 0,
        }
        self.fsr_counts["preprocessed_images"] = (
            0  # by the Hugging Face processor; warm-up left out
        )
        capacity = self.fsr_settings.pixel_cache_bytes if self.fsr_settings is not None else 0
        self.fsr_pixels = PixelCache(capacity) if capacity else None
        self._fsr_lock = threading.Lock()
        self._fsr_given = set(self.fsr_family.signals)
        if self.fsr_settings is not None and self.fsr_settings.text_encoder != "none":
            self._fsr_given.add("relevance")
        self._fsr_codebook = ""
        codebook = (
            prototype_file(self.info.ctx.model_config.model)
            if self.fsr_settings is not None
            else None
        )
        if codebook:
            self._fsr_given.add("prototypes")
            self._fsr_codebook = hashlib.sha256(Path(codebook).read_bytes()).hexdigest()

    def fsr_check_defaults(self) -> None:
        """ValueError, at start, if what the server gives requests that do not say could not be
        served.
        """
        settings = self.fsr_settings
        if settings is None or self.fsr_unsupported:
            return
        total = self.fsr_family.most_tokens(self.info.get_hf_config())
        for budget in (
            settings.default_budget,
            *settings.detail_budgets.values(),
            settings.min_budget or 1,
        ):
            try:
                resolve(RequestFields(fsr_budget=budget), settings, [total], self._fsr_given)
            except FieldError as error:
                raise ValueError(
                    f"plugin fsr: requests that rely on the server's defaults would fail: {error}"
                ) from None

    # Steps of vLLM's processor, in order
    # -------------------------------------------------------------------------

    def _hf_processor_applies_updates(self, *args: Any, **kwargs: Any) -> bool:
        """Asked until 0.28: Hugging Face's processor would write the unpruned number of
        placeholders.
        """
        return (
            super()._hf_processor_applies_updates(*args, **kwargs)
            if self.fsr_settings is None
            else False
        )

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        return self._profiled(super().get_dummy_inputs(*args, **kwargs))

    def _profiled(self, inputs: ProcessorInputs) -> ProcessorInputs:
        """Profiling inputs, planned at the largest budget any request can have."""
        if self.fsr_settings is None or self.fsr_unsupported:
            return inputs
        return self._planned(
            inputs, {"fsr_budget": self.fsr_settings.max_budget or "off"}, dummy=True
        )

    def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
        if self.fsr_settings is not None and (uuid := reserved_uuid(inputs)) is not None:
            # It would be another image's identity, of another number of rows.
            raise request_error(
                f"uuid must not begin with {RESERVED!r}, as the server's own identities do; "
                f"got {shown(uuid)}",
                "uuid",
            )
        if not isinstance(inputs, PlannedInputs):
            if (wrong := misspelt(inputs.hf_processor_mm_kwargs)) is not None:
                inactive = why_inactive(HOW_TO_ACTIVATE) if self.fsr_settings is None else None
                why = inactive or self.fsr_unsupported
                raise request_error(f"{wrong.field}: {why}" if why else str(wrong), wrong.field)
            inputs = self._plan_request(inputs)
        result = super().apply(inputs, *args, **kwargs)
        if isinstance(inputs, PlannedInputs) and inputs.fsr_plans and not inputs.fsr_dummy:
            result[RESULT_KEY] = self._count(inputs.fsr_plans)
            if inputs.fsr_adaptive is not None:
                result[ADAPTIVE_KEY] = inputs.fsr_adaptive
        return result

    def _get_cache_missing_items(self, cache: Any, mm_data_items: Any, mm_hashes: Any) -> Any:
        is_cached, missing = super()._get_cache_missing_items(cache, mm_data_items, mm_hashes)
        plans = getattr(mm_data_items, "fsr_plans", None)
        if plans:
            places = [place for place, cached in enumerate(is_cached["image"]) if not cached]
            missing.fsr_plans = [plans[place] for place in places]
            missing.fsr_keys = [mm_data_items.fsr_keys[place] for place in places]
            missing.fsr_dummy = mm_data_items.fsr_dummy
        return is_cached, missing

    def _apply_hf_processor_main(self, *args: Any, **kwargs: Any) -> Any:
        items = mm_items_of(args, kwargs)
        plans = getattr(items, "fsr_plans", None)
        if not plans:
            return super()._apply_hf_processor_main(*args, **kwargs)
        result = self._preprocess(items, args, kwargs)
        packed = [pack_plan(key, plan) for key, plan in zip(items.fsr_keys, plans, strict=True)]
        processed_data_of(result)[PLAN_FIELD] = packed
        return result

    def _preprocess(self, items: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stock step for images whose pixels are not in the cache, and all images in their
        order as its result.
        """
        keys, cache = items.fsr_keys, self.fsr_pixels
        by_us = cache is not None and all(keys) and set(items) == {"image"}
        found = dict.fromkeys(keys) if by_us else {}
        for key in found:
            found[key] = cache.get(key)  # type: ignore[union-attr]
        # An image that stands twice in a prompt is preprocessed once.
        places = [
            i
            for i, key in enumerate(keys)
            if not by_us or (found[key] is None and key not in keys[:i])
        ]
        if by_us and len(places) < len(keys):
            some = with_items(args, kwargs, some_images(self.info, items, places))
            result = super()._apply_hf_processor_main(*some[0], **some[1])
        else:
            result = super()._apply_hf_processor_main(*args, **kwargs)
        with self._fsr_lock:
            self.fsr_counts["preprocessed_images"] += 0 if items.fsr_dummy else len(places)
        if cache is None or not by_us:
            return result
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
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_kwargs))
        if PLAN_FIELD in hf_inputs:
            # Read by Python in the worker: on the device it would cost a synchronisation per batch.
            fields[PLAN_FIELD] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return fields

    def _get_prompt_updates(self, mm_items: MultiModalDataItems, *args: Any, **kwargs: Any) -> Any:
        updates = super()._get_prompt_updates(mm_items, *args, **kwargs)
        plans = getattr(mm_items, "fsr_plans", None)
        return [self._shortened(update, plans) for update in updates] if plans else updates

    def _plan_request(self, inputs: ProcessorInputs) -> ProcessorInputs:
        given = inputs.hf_processor_mm_kwargs
        fields = {k: v for k, v in given.items() if k.startswith(PREFIX) and v is not None}
        derived = Derived()
        if isinstance(fields.get(DERIVED_KEY), Derived):
            derived = fields.pop(DERIVED_KEY)
        if self.fsr_settings is None or self.fsr_unsupported:
            why = self.fsr_unsupported
            if self.fsr_settings is None:
                why = why_inactive(HOW_TO_ACTIVATE)
            if fields:
                raise request_error(f"{min(fields)}: {why}", min(fields))
            return inputs
        images = inputs.mm_data_items.get("image")
        if images is None:
            return self._without(inputs)
        try:
            if isinstance(images, ImageProcessorItems):
                return self._planned(inputs, fields, derived)
            rows = embedding_rows(images)
            return self._without(inputs, fsr_plans=plan_embeddings(fields, self.fsr_settings, rows))
        except FieldError as error:
            raise request_error(str(error), error.field) from None

    def _without(self, inputs: ProcessorInputs, **more: Any) -> PlannedInputs:
        """The same inputs without our fields, which are neither the Hugging Face processor's nor
        hash factors.
        """
        values = {
            field.name: getattr(inputs, field.name) for field in dataclasses.fields(ProcessorInputs)
        }
        rest = {k: v for k, v in inputs.hf_processor_mm_kwargs.items() if not k.startswith(PREFIX)}
        return PlannedInputs(**{**values, "hf_processor_mm_kwargs": rest}, **more)

    def _planned(
        self,
        inputs: ProcessorInputs,
        values: Mapping[str, Any],
        derived: Derived | None = None,
        dummy: bool = False,
    ) -> PlannedInputs:
        """Inputs with a plan per image; FieldError if what the client asked for cannot be."""
        settings = self.fsr_settings
        assert settings is not None
        items = inputs.mm_data_items
        count = items.get_count("image", strict=False)
        totals = [
            self.fsr_family.total(self.info, items["image"], index, {}) for index in range(count)
        ]
        # Now rather than on arrival: what waits to be prepared is part of the load.
        fields = RequestFields.parse(values, settings)
        fields, by_load = completed(settings, fields, derived or Derived(), totals)
        plans = resolve(fields, settings, totals, self._fsr_given)
        planned = self._without(
            inputs,
            fsr_plans=plans,
            fsr_settings=settings,
            fsr_codebook=self._fsr_codebook,
            fsr_dummy=dummy,
        )
        planned.fsr_adaptive = by_load
        items.fsr_plans, items.fsr_keys, items.fsr_dummy = plans, [None] * count, dummy
        if not dummy and count and (settings.pixel_cache_bytes or settings.feature_cache_bytes):
            planned.fsr_hashes, images = image_hashes(planned, self.info)
            items.fsr_keys = [image_key(image) for image in images]
        return planned

    def _shortened(self, update: Any, plans: Sequence[ImagePlan]) -> Any:
        if update.modality != "image":
            return update
        stock = update.replacement

        def replacement(index: int) -> Any:
            placeholder = stock(index) if callable(stock) else stock
            return (
                self.fsr_family.shorten(placeholder, plans[index])
                if plans[index].pruned
                else placeholder
            )

        return dataclasses.replace(update, replacement=replacement)

    def fsr_stats(self) -> dict[str, int]:
        """What this front end was asked for and what it preprocessed, with the pixel cache's
        pixel_*.
        """
        with self._fsr_lock:
            return self.fsr_counts | (
                self.fsr_pixels.stats() if self.fsr_pixels is not None else {}
            )

    def fsr_methods(self) -> list[str]:
        """The methods a request may name here: those that can be served, and have their inputs in
        this model.
        """
        known = list_methods()
        return [name for name in served_methods() if self._fsr_given.issuperset(known[name].needs)]

    def _count(self, plans: Sequence[ImagePlan]) -> tuple[int, int]:
        kept, total = (sum(getattr(plan, name) for plan in plans) for name in ("keep", "total"))
        with self._fsr_lock:
            self.fsr_counts["images"] += len(plans)
            self.fsr_counts["pruned_images"] += sum(plan.pruned for plan in plans)
            self.fsr_counts["visual_tokens_kept"] += kept
            self.fsr_counts["visual_tokens_total"] += total
        return kept, total


def processor_factory(stock: Callable[..., Any], family: Family) -> Any:
    """A factory for vLLM's registry: the stock processor of this checkpoint with our mixin before it."""

    def build(info: Any, dummy_inputs: Any, **more: Any) -> Any:  # until 0.30 also `cache`
        kind = type(stock(info, dummy_inputs, **more))
        body = {"fsr_family": family}
        built = type(f"Fsr{kind.__name__}", (FsrProcessorMixin, kind), body)(
            info, dummy_inputs, **more
        )
        built.fsr_unsupported = family.unsupported(info.get_hf_config())
        built.fsr_check_defaults()
        return built

    return build
