"""The part of `compat` that concerns identities of images: what vLLM's scheduler and outputs know
an image by.

Same rules as there: each entry says why it is needed, in which versions it was read or run, and
when it can go.
"""

from __future__ import annotations

import re
from typing import Any

# How identities of pruned images begin. They share vLLM's caches with the uuids of clients, who may
# not use it.
RESERVED = "fsr:"
_PRUNED = re.compile(r"fsr:([0-9]{1,7}):[0-9a-f]{64}")


def mark(total: int, digest: str) -> str:
    """The identity of a pruned image: it says how many tokens the image has unpruned.

    Why: the scheduler and request outputs know an image by its placeholders and identity alone;
    with the shared-memory processor cache its plan does not reach them.
    """
    return f"{RESERVED}{total}:{digest}"


def unpruned_tokens(feature: Any) -> int:
    """Tokens of an image before pruning, as the identity on its MultiModalFeatureSpec says; 0 for
    all others.

    `mm_hash` is the identity without the prefix of a LoRA adapter; attributes in 0.26-0.33.
    """
    found = _PRUNED.fullmatch(feature.mm_hash or feature.identifier)
    return int(found[1]) if found else 0


def visual_tokens(features: Any) -> tuple[int, int]:
    """(kept, total) over the images of a request's MultiModalFeatureSpecs; (0, 0) without images."""
    kept = total = 0
    for feature in features or ():
        if feature.modality == "image":
            embeds = feature.mm_position.get_num_embeds()
            kept, total = kept + embeds, total + (unpruned_tokens(feature) or embeds)
    return kept, total


def reserved_uuid(inputs: Any) -> str | None:
    """The first uuid a client gave one of its media that begins as our identities do, or None."""
    given = (uuid for uuids in (inputs.mm_uuid_items or {}).values() for uuid in uuids or ())
    return next(
        (uuid for uuid in given if isinstance(uuid, str) and uuid.startswith(RESERVED)), None
    )
