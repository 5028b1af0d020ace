"""From a request's fields to one plan per image, and the cache identity that says what is kept."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cachetools import LRUCache

from fsr_vllm import adaptive
from fsr_vllm.compat.identity import mark
from fsr_vllm.compat.types import Items, ProcessingInfo
from fsr_vllm.engine.wire import image_key
from fsr_vllm.params import (
    SELECTION_VERSION,
    Derived,
    FieldError,
    FsrRequest,
    ImagePlan,
    RequestFields,
    ServerSettings,
    resolve,
    resolve_budget,
    shown,
)

if TYPE_CHECKING:
    from fsr_vllm.engine.families.base import Family

KNOWN_UUIDS = 1 << 16  # images that clients named, whose number of tokens is remembered


def prototype_file(model: str) -> str | None:
    """The codebook beside a model in a local folder (`methods.prototypes`), if there is one."""
    # It has a folder of its own, since loaders take every *.safetensors file beside the model for
    # weights of the model.
    path = Path(model, "fsr", "prototypes.safetensors")
    return str(path) if path.is_file() else None


class Planner:
    """Plans the images of one model under one server's settings.

    Of a prompt it keeps nothing but the number of tokens of images that have a `uuid`, where that
    follows from their size: a later prompt may name them without sending them.
    """

    def __init__(self, settings: ServerSettings, family: Family, info: ProcessingInfo) -> None:
        """`info` is vLLM's processing info. Errors: ValueError if requests that rely on the
        server's defaults could not be served.
        """
        self.settings, self.family, self.info = settings, family, info
        self.signals = set(family.signals)
        if settings.text_encoder != "none":
            self.signals.add("relevance")
        codebook = prototype_file(info.ctx.model_config.model)
        digest = ""
        if codebook is not None:
            self.signals.add("prototypes")
            digest = hashlib.sha256(Path(codebook).read_bytes()).hexdigest()
        self.salt = identity_salt(settings, digest)
        self._known: LRUCache[bytes, int] = LRUCache(KNOWN_UUIDS)
        self._lock = threading.Lock()
        self._check_defaults()

    def plan(
        self,
        request: FsrRequest,
        images: Items,
        options: Mapping[str, object],
        uuids: Sequence[str | None] | None = None,
    ) -> tuple[list[ImagePlan], int | None]:
        """One plan per image, in prompt order; and the default budget, where it follows the load
        and was used. `options` are the Hugging Face processor's, `uuids` what clients call images.

        Errors: FieldError where the images cannot have what the client asked for.
        """
        count = images.get_count()
        names = uuids or [None] * count
        totals = [self._total(images, place, options, names[place]) for place in range(count)]
        fields, by_load = completed(self.settings, request.fields, request.derived, totals)
        plans = resolve(fields, self.settings, totals, self.signals)
        return plans, by_load

    def _total(
        self, images: Items, place: int, options: Mapping[str, object], uuid: str | None
    ) -> int:
        """N of an image; FieldError if only its `uuid` is there and nothing is known of that."""
        total = self.family.total(self.info, images, place, options)
        if self.family.one_size or not uuid:
            if total is None:
                raise FieldError("uuid", "an image was named without data and without a uuid")
            return total
        # A digest: clients write both, as long as they like.
        key = image_key(repr((uuid, sorted(options.items()))))
        with self._lock:
            if total is not None:
                self._known[key] = total
            total = self._known.get(key)
        if total is None:
            raise FieldError(
                "uuid",
                f"uuid {shown(uuid)}: this server does not know the image behind it, whose size "
                "says how many visual tokens it has: send the image itself; its data was not "
                "provided",
            )
        return total

    def _check_defaults(self) -> None:
        settings = self.settings
        total = self.family.most_tokens(self.info.get_hf_config())
        details = settings.detail_budgets.values()
        for budget in (settings.default_budget, *details, settings.min_budget or 1):
            try:
                resolve(RequestFields(fsr_budget=budget), settings, [total], self.signals)
            except FieldError as error:
                raise ValueError(
                    f"plugin fsr: requests that rely on the server's defaults would fail: {error}"
                ) from None


def identity_salt(settings: ServerSettings, codebook: str = "") -> str:
    """What shapes every selection and is in no plan; `codebook` is the digest of its file."""
    # It matters where KV blocks outlive this server.
    parts = (SELECTION_VERSION, settings.text_encoder, settings.relevance_sign, codebook)
    return "\0".join(["fsr", *map(str, parts)])


def identity(base: str, plan: ImagePlan, salt: str) -> str:
    """Cache identity of a planned image; one that is not pruned keeps vLLM's own."""
    if not plan.pruned:
        return base
    digest = hashlib.sha256(f"{salt}\0{base}\0".encode() + plan.encode())
    return mark(plan.total, digest.hexdigest())


def completed(
    settings: ServerSettings, fields: RequestFields, derived: Derived, totals: Sequence[int]
) -> tuple[RequestFields, int | None]:
    """The client's fields, with derived values and the default budget where it says nothing; and
    that default, where it follows the load and was used.

    What the client did not ask for is brought within the server's range rather than refused.
    """
    derived = derived.of(len(totals))
    update: dict[str, object] = {}
    if fields.fsr_question is None and derived.questions:
        update["fsr_question"] = list(derived.questions)
    by_load = None
    if fields.fsr_budget is None and totals:
        budgets = derived.budgets or (None,) * len(totals)
        # Read now rather than on arrival: what waits to be prepared is part of the load.
        by_load = adaptive.default_budget(settings.adaptive_range) if None in budgets else None
        default = by_load or settings.default_budget
        low, high = settings.min_budget or 1, settings.max_budget
        kept = [
            resolve_budget(default if budget is None else budget, total)
            for budget, total in zip(budgets, totals, strict=True)
        ]
        update["fsr_budget"] = [
            min(max(tokens, low), high or total) for tokens, total in zip(kept, totals, strict=True)
        ]
    return fields.model_copy(update=update), by_load
