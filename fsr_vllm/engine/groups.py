"""An image's groups of rows (tiles): a budget is split over them, what they keep is joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fsr_vllm.engine.types import EncodedImage
from fsr_vllm.methods import PrunedTokens


def split(keep: int, sizes: Sequence[int]) -> list[int]:
    """A budget over the groups of an image: as equal as their sizes allow, what is left over to the
    first.

    A group may get 0; together they get min(keep, all rows).
    """
    given = [0] * len(sizes)
    left = min(keep, sum(sizes))
    while left:
        free = [place for place, size in enumerate(sizes) if given[place] < size]
        share = left // len(free)
        for place in free if share else free[:left]:
            more = min(share or 1, sizes[place] - given[place])
            given[place] += more
            left -= more
    return given


def as_one(image: EncodedImage) -> EncodedImage:
    """The image with all its groups as one, in row order; what was told of each group is left out.

    Signals of a whole group, such as attention within a tile, do not add up to one of the image.
    """
    if len(image.groups) < 2:
        return image
    group = torch.cat(image.groups).sort().values
    return replace(image, groups=(group,), grids=(None,), group_signals={})


def joined(image: EncodedImage, keep: int, groups: Mapping[int, PrunedTokens]) -> PrunedTokens:
    """What was kept of an image's groups, as places in the image, in its own order.

    A budget above all candidates is filled with the first rows that are none, in row order.
    """
    if not image.groups:
        return groups[0]
    count, device = len(image.rows), image.rows.device
    merged_into = torch.full((count,), -1, device=device)
    tokens, indices, flags = [], [], []
    for number, pruned in groups.items():
        places = image.groups[number]
        tokens.append(pruned.tokens)
        indices.append(places[pruned.indices])
        flags.append(pruned.is_focus)
        into = pruned.merged_into
        merged_into[places] = torch.where(into < 0, into, places[into.clamp(min=0)])
    missing = keep - sum(len(part) for part in indices)
    if missing:
        spare = torch.ones(count, dtype=torch.bool, device=device)
        spare[torch.cat(image.groups)] = False
        places = spare.nonzero()[:missing, 0]
        tokens.append(image.rows[places])
        indices.append(places)
        flags.append(torch.ones_like(places, dtype=torch.bool))
    kept, order = torch.cat(indices).sort()
    numbers = {
        name: torch.stack([getattr(pruned, name) for pruned in groups.values()]).sum()
        for name in ("k_focus", "num_focus", "num_scan", "num_merged")
    }
    return PrunedTokens(
        tokens=torch.cat(tokens)[order],
        indices=kept,
        is_focus=torch.cat(flags)[order],
        merged_into=merged_into,
        **numbers,
    )
