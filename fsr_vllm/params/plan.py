"""What happens to each image of a request, resolved to integers before any hash."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from fsr_vllm.methods.budget import resolve_budget
from fsr_vllm.methods.options import beyond_serving

from .budget import FieldError, per_image
from .method import build_method
from .request import RequestFields
from .server import ServerSettings

# Part of every pruned image's cache identity. Raise it whenever the same plan may keep other tokens
# than before, so that KV blocks in external or persistent caches of older versions are not taken
# for current ones.
SELECTION_VERSION = 3


@dataclass(frozen=True)
class ImagePlan:
    """What happens to one image: `keep` of `total` visual tokens, by `method`.

    All that changes the image's rows is in here.
    """

    total: int
    keep: int
    method: str = ""
    options: str = "{}"
    question: str = ""

    @property
    def pruned(self) -> bool:
        """Whether the image keeps fewer visual tokens than it has."""
        return self.keep < self.total

    def encode(self) -> bytes:
        """Canonical bytes, for the cache identity and for the way to the worker."""
        return json.dumps(vars(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> ImagePlan:
        """The plan that `encode` wrote."""
        return cls(**json.loads(data))


def resolve(
    fields: RequestFields, settings: ServerSettings, totals: Sequence[int], signals: Collection[str]
) -> list[ImagePlan]:
    """One plan per image, in prompt order; `signals` are what this model can give a method."""
    count = len(totals)
    asked = settings.default_budget if fields.fsr_budget is None else fields.fsr_budget
    budgets = per_image(asked, count, "fsr_budget")
    questions = per_image(fields.fsr_question or "", count, "fsr_question")
    name = fields.fsr_method or settings.method
    method = build_method(name, fields.fsr_options)
    options = json.dumps(asdict(method), sort_keys=True, separators=(",", ":"))
    missing = [signal for signal in method.needs if signal not in signals]
    reads = {"relevance", "text"} & {
        *method.needs,
        *method.uses,
    }  # where a question can come in
    asks = method.query_aware and not reads.isdisjoint(signals)
    plans = []
    for total, budget, question in zip(totals, budgets, questions, strict=True):
        keep = resolve_budget(budget, total)
        if not isinstance(budget, int):
            settings.check_bounds(budget, total=total)
        if keep >= total:
            plans.append(ImagePlan(total, total))
            continue
        if missing:
            raise FieldError(
                "fsr_method",
                f"fsr_method {name!r} needs {', '.join(missing)}, which this server does not have",
            )
        if excess := beyond_serving(method, total):
            raise FieldError("fsr_options", f"fsr_options: {excess}")
        plans.append(ImagePlan(total, keep, name, options, question.strip() if asks else ""))
    return plans
