"""Identities of images: what vLLM's scheduler, caches and outputs know an image by."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fsr_vllm.compat.patching import Entry
from fsr_vllm.compat.types import Feature, Inputs

IDENTITY = Entry(
    "vllm.multimodal.inputs:MultiModalFeatureSpec",
    "The scheduler and request outputs know an image by its placeholders and identity alone; with "
    "the shared-memory processor cache its plan does not reach them. So the identity of a pruned "
    "image says how many tokens it has unpruned. `mm_hash` is it without a LoRA adapter's prefix.",
    "the plan reaches the scheduler",
)
UUIDS = Entry(
    "vllm.multimodal.processing:ProcessorInputs",
    "`mm_uuid_items`: names that clients give their media share vLLM's caches with identities, so "
    "that none may begin as those of pruned images do.",
    "identities have a name space of plugins",
)

# How identities of pruned images begin.
RESERVED = "fsr:"
_PRUNED = re.compile(r"fsr:([0-9]{1,7}):[0-9a-f]{64}")


def mark(total: int, digest: str) -> str:
    """The identity of a pruned image: it says how many tokens the image has unpruned."""
    return f"{RESERVED}{total}:{digest}"


def unpruned_tokens(feature: Feature) -> int:
    """Tokens of an image before pruning, as its identity says; 0 for all others."""
    found = _PRUNED.fullmatch(feature.mm_hash or feature.identifier)
    return int(found[1]) if found else 0


def visual_tokens(features: Iterable[Feature] | None) -> tuple[int, int]:
    """(kept, total) over the images of a request; (0, 0) without images."""
    kept = total = 0
    for feature in features or ():
        if feature.modality == "image":
            embeds = feature.mm_position.get_num_embeds()
            kept, total = kept + embeds, total + (unpruned_tokens(feature) or embeds)
    return kept, total


def reserved_uuid(inputs: Inputs) -> str | None:
    """The first uuid a client gave one of its media that begins as our identities do, or None."""
    given = (uuid for uuids in (inputs.mm_uuid_items or {}).values() for uuid in uuids or ())
    return next(
        (uuid for uuid in given if isinstance(uuid, str) and uuid.startswith(RESERVED)), None
    )
