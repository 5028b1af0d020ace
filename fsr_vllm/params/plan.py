"""What happens to each image of a request, resolved to integers before any hash."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from fsr_vllm.methods.budget import resolve_budget
from fsr_vllm.methods.options import beyond_serving

from .budget import Budget, FieldError, Total, per_image
from .method import build_method, joint_tiles
from .request import RequestFields
from .server import ServerSettings

# Part of every pruned image's cache identity. Raise it whenever the same plan may keep other tokens
# than before, so that KV blocks in external or persistent caches of older versions are not taken
# for current ones.
SELECTION_VERSION = 3
# Signals of a tile as a whole, which say nothing of several together.
OF_ONE_TILE = frozenset({"attention", "last_query", "last_key"})


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
    tiles: str = ""  # "joint": the tiles of an image are pruned as one set of tokens

    @property
    def pruned(self) -> bool:
        """Whether the image keeps fewer visual tokens than it has."""
        return self.keep < self.total

    def encode(self) -> bytes:
        """Canonical bytes, for the cache identity and for the way to the worker."""
        # Without `tiles` where it is not asked for: identities are what they were before it.
        values = {name: value for name, value in vars(self).items() if value or name != "tiles"}
        return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> ImagePlan:
        """The plan that `encode` wrote."""
        return cls(**json.loads(data))


def _budgets(
    fields: RequestFields, settings: ServerSettings, totals: Sequence[int]
) -> Sequence[Budget]:
    """One budget per image; a total over all of them is divided here, and its parts judged."""
    asked = settings.default_budget if fields.fsr_budget is None else fields.fsr_budget
    if not isinstance(asked, Total):
        return per_image(asked, len(totals), "fsr_budget")
    parts = asked.share(totals)
    for kept, total in zip(parts, totals, strict=True):
        settings.check_part(kept, total, f"fsr_budget {asked!r}", "fsr_budget")
    return parts


def resolve(
    fields: RequestFields, settings: ServerSettings, totals: Sequence[int], signals: Collection[str]
) -> list[ImagePlan]:
    """One plan per image, in prompt order; `signals` are what this model can give a method."""
    count = len(totals)
    budgets = _budgets(fields, settings, totals)
    questions = per_image(fields.fsr_question or "", count, "fsr_question")
    name = fields.fsr_method or settings.method
    method = build_method(name, fields.fsr_options)
    options = json.dumps(asdict(method), sort_keys=True, separators=(",", ":"))
    tiles = "joint" if joint_tiles(fields.fsr_options) else ""
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
        if tiles and (whole := sorted(OF_ONE_TILE.intersection(method.needs))):
            raise FieldError(
                "fsr_options",
                f"fsr_options.tiles: {name!r} reads {', '.join(whole)}, which every tile has for "
                'itself; leave it out, or give "split"',
            )
        if excess := beyond_serving(method, total):
            raise FieldError("fsr_options", f"fsr_options: {excess}")
        text = question.strip() if asks else ""
        plans.append(ImagePlan(total, keep, name, options, text, tiles))
    return plans
