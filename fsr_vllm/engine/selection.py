"""Which rows of each image are kept: images of one method and shape are pruned together."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fsr_vllm.compat.parallel import broadcast_from_first, tensor_parallel_size
from fsr_vllm.engine.attention_hook import SHALLOW, shallow_key, shallow_keys
from fsr_vllm.engine.families.base import WorkerHalf
from fsr_vllm.engine.groups import as_one, joined, split
from fsr_vllm.engine.stats import Counts
from fsr_vllm.engine.types import EncodedImage, batched
from fsr_vllm.methods import Method, PrunedTokens, VisualTokens, get_method
from fsr_vllm.params import ImagePlan


class TextSide(Protocol):
    """What measures how relevant patches are to a question."""

    per_patch: bool  # whether `relevance` speaks of patches of the tower, or of rows

    def relevance(self, tower: Tensor, rows: Tensor, questions: Sequence[str]) -> Tensor:
        """(B, P) or (B, N) float32, higher = more relevant."""

    def clear(self) -> None:
        """Forget questions: the weights have changed."""


class Words(Protocol):
    """The language model's embeddings of a question."""

    def embeddings(self, text: str) -> Tensor:
        """One row per token, (T, D)."""

    def clear(self) -> None:
        """Forget questions: the weights have changed."""


@dataclass
class Inputs:
    """What methods may need beside the images themselves; None where this server has none."""

    relevance: TextSide | None = None
    words: Words | None = None
    prototypes: Tensor | None = None


class _Kind(NamedTuple):
    """What parts of images have in common that are pruned in one call."""

    method: str
    options: str
    keep: int
    size: int
    grid: tuple[int, int] | None
    text: str  # a question is one input for a whole call, where a method reads its words


class _Part(NamedTuple):
    image: int
    group: int


@functools.lru_cache(maxsize=256)
def method_of(name: str, options: str) -> Method:
    """The method that a plan names."""
    return get_method(name, **json.loads(options))


def wanted(plans: Sequence[ImagePlan]) -> frozenset[str]:
    """The inputs of all methods that these plans name, and their shallow signals."""
    names: set[str] = set()
    for plan in plans:
        if plan.pruned:
            method = method_of(plan.method, plan.options)
            names |= {*_needs(method), *shallow_keys(method)}
    return frozenset(names)


class Selector:
    """Runs the methods of one call's plans."""

    def __init__(self, worker: WorkerHalf, inputs: Inputs, counts: Counts) -> None:
        self._worker, self._inputs, self._counts = worker, inputs, counts

    def select(
        self, images: Sequence[EncodedImage], plans: Sequence[ImagePlan]
    ) -> list[PrunedTokens | None]:
        """Exactly K rows of each image whose plan prunes it, None for the others."""
        images = [
            as_one(image) if plan.tiles else image
            for image, plan in zip(images, plans, strict=True)
        ]
        kinds: dict[_Kind, list[_Part]] = defaultdict(list)
        for place, (image, plan) in enumerate(zip(images, plans, strict=True)):
            if not plan.pruned:
                continue
            text = plan.question if "text" in _needs(method_of(plan.method, plan.options)) else ""
            sizes = image.sizes
            for group, keep in enumerate(split(plan.keep, sizes)):
                if keep:
                    kind = _Kind(
                        plan.method, plan.options, keep, sizes[group], image.grids[group], text
                    )
                    kinds[kind].append(_Part(place, group))
        chosen: dict[int, dict[int, PrunedTokens]] = defaultdict(dict)
        for kind, parts in kinds.items():
            pruned = self._prune(kind, parts, images, plans)
            for place, part in enumerate(parts):
                chosen[part.image][part.group] = pruned.of(place)
        self._counts.add(
            images=len(plans),
            pruned_images=sum(plan.pruned for plan in plans),
            selection_calls=len(kinds),
        )
        return [
            joined(image, plan.keep, chosen[place]) if plan.pruned else None
            for place, (image, plan) in enumerate(zip(images, plans, strict=True))
        ]

    def _prune(
        self,
        kind: _Kind,
        parts: Sequence[_Part],
        images: Sequence[EncodedImage],
        plans: Sequence[ImagePlan],
    ) -> PrunedTokens:
        method = method_of(kind.method, kind.options)
        tokens = self._tokens(method, kind, parts, images, plans)
        pruned = method.prune(tokens, kind.keep, validate=False)
        if tensor_parallel_size() > 1:
            # Ranks must not disagree about a near tie: rank 0 settles the choice and what was
            # merged.
            pruned.tokens = broadcast_from_first(pruned.tokens)
            pruned.indices = broadcast_from_first(pruned.indices)
        self._counts.add(
            kept=len(parts) * kind.keep,
            k_focus=pruned.k_focus.sum(),
            num_scan=pruned.num_scan.sum(),
            num_merged=pruned.num_merged.sum(),
        )
        return pruned

    def _tokens(
        self,
        method: Method,
        kind: _Kind,
        parts: Sequence[_Part],
        images: Sequence[EncodedImage],
        plans: Sequence[ImagePlan],
    ) -> VisualTokens:
        """The method's inputs for parts of one kind, (B, n, ...)."""

        def stacked(values: Mapping[int, Tensor] | None = None, name: str = "") -> Tensor:
            of_parts = []
            for part in parts:
                image = images[part.image]
                value = values[part.image] if values is not None else image.signals[name]
                of_parts.append(value[image.groups[part.group]] if image.groups else value)
            return batched(of_parts)

        needs = _needs(method)
        features = stacked({part.image: images[part.image].rows for part in parts})
        given: dict[str, Any] = {}
        first = images[parts[0].image]
        for name in needs:
            key = shallow_key(name, method.shallow_layer) if name in SHALLOW else name
            if key in first.signals:
                given[name] = stacked(name=key)
            elif key in first.group_signals:
                entries = [images[part.image].group_signals[key][part.group] for part in parts]
                given[name] = batched(entries)
        if "grid" in needs:
            given["grid"] = kind.grid
        if "prototypes" in needs and self._inputs.prototypes is not None:
            self._inputs.prototypes = self._inputs.prototypes.to(features.device)  # once
            given["prototypes"] = self._inputs.prototypes
        if "text" in needs and self._inputs.words is not None:
            given["text"] = self._inputs.words.embeddings(kind.text).to(features.device)
        if "relevance" in needs and self._inputs.relevance is not None:
            places = list(dict.fromkeys(part.image for part in parts))
            asked = [(images[place], plans[place].question) for place in places]
            found = self._relevance(self._inputs.relevance, asked)
            given["relevance"] = stacked(dict(zip(places, found, strict=True)))
        return VisualTokens(features=features, **given)

    def _relevance(self, text: TextSide, asked: Sequence[tuple[EncodedImage, str]]) -> list[Tensor]:
        """(N,) float32 per image; constant where there is no question."""
        found = [image.rows.new_ones(len(image.rows), dtype=torch.float32) for image, _ in asked]
        shapes: dict[Any, list[int]] = defaultdict(list)
        for place, (image, question) in enumerate(asked):
            if question and image.tower is not None:
                shapes[image.rows.shape, image.tower.shape].append(place)
        for places in shapes.values():
            some = [asked[place][0] for place in places]
            values = text.relevance(
                batched([image.tower for image in some if image.tower is not None]),
                batched([image.rows for image in some]),
                [asked[place][1] for place in places],
            )
            for place, value in zip(places, values, strict=True):
                image = asked[place][0]
                found[place] = self._worker.place(image, value) if text.per_patch else value
        return found


def _needs(method: Method) -> tuple[str, ...]:
    return (*method.needs, *method.uses)
