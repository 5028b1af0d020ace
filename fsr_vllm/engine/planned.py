"""vLLM's processor inputs and media items, with one plan per image."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from vllm.multimodal.parse import MultiModalDataItems, ProcessorBatchItems
from vllm.multimodal.processing import ProcessorInputs

from fsr_vllm.compat.embeddings import embedding_rows
from fsr_vllm.compat.errors import request_error
from fsr_vllm.compat.identity import RESERVED, reserved_uuid
from fsr_vllm.compat.processing import image_hashes
from fsr_vllm.compat.types import Anything, Items
from fsr_vllm.engine.embeddings import plan_embeddings
from fsr_vllm.engine.planning import Planner, identity
from fsr_vllm.engine.wire import PLAN_FIELD, image_key
from fsr_vllm.params import FsrRequest, ImagePlan, Report, RequestFields, shown, without_fields

# The modalities that are pruned, and the field of the processed inputs that carries their plans.
PLAN_FIELDS = {"image": PLAN_FIELD}
IMAGE = "image"  # the modality whose preprocessed items are kept, and that may be embeddings


@dataclass(frozen=True)
class Plans:
    """What happens to the media of a prompt, or to some of them: by modality, in prompt order."""

    plans: Mapping[str, Sequence[ImagePlan]]
    # The items' own cache keys, whatever is kept of them; None: never cached.
    keys: Mapping[str, Sequence[bytes | None]]
    dummy: bool = False  # made for profiling: neither counted nor cached
    hashes: Mapping[str, Sequence[str]] | None = None  # vLLM's own of all media, once known
    salt: str = ""  # of the identities, see `planning.identity_salt`
    by_load: int | None = None  # the default budget, where it follows the load and was used

    def at(self, places: Mapping[str, Sequence[int]]) -> Plans:
        """The same of some items of each modality; one that has none of them is left out."""
        some = {name: places[name] for name in self.plans if places.get(name)}
        return replace(
            self,
            plans={name: [self.plans[name][i] for i in where] for name, where in some.items()},
            keys={name: [self.keys[name][i] for i in where] for name, where in some.items()},
        )

    def report(self) -> Report:
        """The visual tokens kept, and in all."""
        plans = [plan for some in self.plans.values() for plan in some]
        kept, total = sum(plan.keep for plan in plans), sum(plan.total for plan in plans)
        return Report(kept, total, self.by_load)


class PlannedItems(MultiModalDataItems):
    """Media items with their plans, which stay with them where vLLM selects some modalities."""

    def __init__(self, items: Mapping[str, Items], fsr: Plans) -> None:
        """`fsr` holds the plans of these very items."""
        super().__init__(items)
        self.fsr = fsr

    def select(self, modalities: Collection[str]) -> PlannedItems:
        """The items of some modalities."""
        left = {
            name: range(len(self.fsr.plans[name])) for name in modalities & self.fsr.plans.keys()
        }
        return PlannedItems({name: self[name] for name in modalities}, self.fsr.at(left))


@dataclass
class PlannedInputs(ProcessorInputs):
    """Processor inputs whose media are planned; `hf_processor_mm_kwargs` hold no field of ours."""

    fsr: Plans | None = None

    @classmethod
    def of(cls, inputs: ProcessorInputs, plans: Plans) -> PlannedInputs:
        """The same inputs with plans."""
        values = {field.name: getattr(inputs, field.name) for field in fields(ProcessorInputs)}
        return cls(**values, fsr=plans)

    def get_mm_hashes(self, *args: Anything, **kwargs: Anything) -> dict[str, Sequence[str]]:
        """Identities for the processor cache, the encoder cache and KV blocks."""
        if self.fsr is None:
            return super().get_mm_hashes(*args, **kwargs)
        hashes = dict(self.fsr.hashes or super().get_mm_hashes(*args, **kwargs))
        for modality, plans in self.fsr.plans.items():
            pairs = zip(hashes[modality], plans, strict=True)
            hashes[modality] = [identity(base, plan, self.fsr.salt) for base, plan in pairs]
        return hashes


def plan_request(
    planner: Planner, inputs: ProcessorInputs, request: FsrRequest | None
) -> ProcessorInputs:
    """A request's inputs as they are to be processed. Errors: FieldError if what the client asked
    for cannot be; vLLM's own for a uuid that is reserved.
    """
    if (uuid := reserved_uuid(inputs)) is not None:
        # It would be another image's identity, of another number of rows.
        raise request_error(
            f"uuid must not begin with {RESERVED!r}, as the server's own identities do; "
            f"got {shown(uuid)}",
            "uuid",
        )
    request = request or FsrRequest(RequestFields())
    images = inputs.mm_data_items.get(IMAGE)
    if images is None or isinstance(images, ProcessorBatchItems):
        return planned(planner, inputs, request)
    kept = plan_embeddings(request.fields, planner.settings, embedding_rows(images))
    return PlannedInputs.of(_bare(inputs), Plans({IMAGE: kept}, {}))


def planned(
    planner: Planner, inputs: ProcessorInputs, request: FsrRequest, dummy: bool = False
) -> ProcessorInputs:
    """Inputs with a plan for each item of the modalities that are pruned; unplanned where there is
    none. Errors: as of `Planner.plan`.
    """
    inputs = _bare(inputs)
    plans, by_load = {}, None
    for modality in PLAN_FIELDS.keys() & inputs.mm_data_items.keys():
        items, options = inputs.mm_data_items[modality], inputs.hf_processor_mm_kwargs
        uuids = (inputs.mm_uuid_items or {}).get(modality)
        plans[modality], by_load = planner.plan(request, items, options, uuids)
    if not plans:
        return inputs
    keys: dict[str, list[bytes | None]] = {name: [None] * len(some) for name, some in plans.items()}
    fsr = Plans(plans, keys, dummy, salt=planner.salt, by_load=by_load)
    caching = planner.settings.pixel_cache_bytes or planner.settings.feature_cache_bytes
    if caching and not dummy and IMAGE in plans:
        hashes, images = image_hashes(inputs, planner.info)
        sizes = _sizes(planner, inputs.mm_data_items[IMAGE])
        keys[IMAGE] = [image_key(each + size) for each, size in zip(images, sizes, strict=True)]
        fsr = replace(fsr, hashes=hashes)
    inputs.mm_data_items = PlannedItems(inputs.mm_data_items, fsr)
    return PlannedInputs.of(inputs, fsr)


def _sizes(planner: Planner, images: Items) -> list[str]:
    """What tells images apart that come under one uuid, where their size shapes all that is kept.

    Otherwise the tiles of one would be taken for those of another.
    """
    if planner.family.one_size:
        return [""] * images.get_count()
    places = range(images.get_count())
    known = [place for place in places if images.get(place) is not None]
    sizes = {place: images.get_image_size(place) for place in known}
    return [str(tuple(sizes[place])) if place in sizes else "" for place in places]


def _bare(inputs: ProcessorInputs) -> ProcessorInputs:
    """The same without our fields, which neither Hugging Face's processor nor hashes may see."""
    kwargs = without_fields(inputs.hf_processor_mm_kwargs)
    return replace(inputs, hf_processor_mm_kwargs=kwargs)


class FrontCounts:
    """What one front end was asked for and what it preprocessed, warm-up left out."""

    NAMES = (
        "images", "pruned_images", "visual_tokens_kept", "visual_tokens_total",
        "preprocessed_images",
    )  # fmt: skip

    def __init__(self) -> None:
        """All counts start at 0."""
        self._lock = threading.Lock()
        self._counts = Counter(dict.fromkeys(self.NAMES, 0))

    def add(self, **more: int) -> None:
        """Raise some of the counts."""
        with self._lock:
            self._counts.update(more)

    def add_plans(self, fsr: Plans) -> None:
        """Count a prompt's planned images."""
        plans, report = [plan for some in fsr.plans.values() for plan in some], fsr.report()
        pruned = sum(plan.pruned for plan in plans)
        self.add(
            images=len(plans),
            pruned_images=pruned,
            visual_tokens_kept=report.kept,
            visual_tokens_total=report.total,
        )

    def all(self) -> dict[str, int]:
        """All counts so far."""
        with self._lock:
            return dict(self._counts)
