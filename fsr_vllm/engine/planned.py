"""vLLM's processor inputs and media items, with one plan per image."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import ProcessorInputs

from fsr_vllm.engine.wire import PLAN_FIELD
from fsr_vllm.params import ImagePlan, Report

# The modalities that are pruned, and the field of the processed inputs that carries their plans.
PLAN_FIELDS = {"image": PLAN_FIELD}


@dataclass(frozen=True)
class Plans:
    """What happens to the media of a prompt, or to some of them: by modality, in prompt order."""

    plans: Mapping[str, Sequence[ImagePlan]]
    # The items' own cache keys, whatever is kept of them; None: never cached.
    keys: Mapping[str, Sequence[bytes | None]]
    dummy: bool = False  # made for profiling: neither counted nor cached
    identities: Mapping[str, Sequence[str]] | None = None  # of all media; None: vLLM's own
    by_load: int | None = None  # the default budget, where it follows the load and was used

    def at(self, places: Mapping[str, Sequence[int]]) -> Plans:
        """The same of some items of each modality; of the modalities that are left out, nothing."""
        places = {name: places[name] for name in self.plans if name in places}
        return replace(
            self,
            plans={name: [self.plans[name][i] for i in some] for name, some in places.items()},
            keys={name: [self.keys[name][i] for i in some] for name, some in places.items()},
        )

    def report(self) -> Report:
        """The visual tokens kept, and in all."""
        plans = [plan for some in self.plans.values() for plan in some]
        kept, total = sum(plan.keep for plan in plans), sum(plan.total for plan in plans)
        return Report(kept, total, self.by_load)


class PlannedItems(MultiModalDataItems):
    """Media items with their plans, which stay with them when vLLM selects some modalities."""

    def __init__(self, items: Mapping[str, Any], fsr: Plans) -> None:
        super().__init__(items)
        self.fsr = fsr

    def select(self, modalities: Collection[str]) -> PlannedItems:
        """The items of some modalities."""
        left = {name: range(len(self.fsr.plans[name])) for name in modalities & self.fsr.plans.keys()}
        return PlannedItems({name: self[name] for name in modalities}, self.fsr.at(left))


@dataclass
class PlannedInputs(ProcessorInputs):
    """Processor inputs whose media are planned; `hf_processor_mm_kwargs` hold no field of ours."""

    fsr: Plans | None = None

    @classmethod
    def of(cls, inputs: ProcessorInputs, plans: Plans) -> PlannedInputs:
        """vLLM's inputs with plans; items are planned too where they carry pixels."""
        values = {field.name: getattr(inputs, field.name) for field in fields(ProcessorInputs)}
        return cls(**values, fsr=plans)

    def get_mm_hashes(self, *args: Any, **kwargs: Any) -> Any:
        """Identities for the processor cache, the encoder cache and KV blocks."""
        if self.fsr is not None and self.fsr.identities is not None:
            return dict(self.fsr.identities)
        return super().get_mm_hashes(*args, **kwargs)
