"""From images to rows with signals; the vision tower runs only for images that are not cached."""

from __future__ import annotations

from collections.abc import Sequence

from fsr_vllm.engine.attention_hook import tapped
from fsr_vllm.engine.families.base import WorkerHalf
from fsr_vllm.engine.feature_cache import FeatureCache
from fsr_vllm.engine.stats import Counts
from fsr_vllm.engine.types import EncodedImage, ImageFeatures, ImageInput


class Encoder:
    """Encodes the images of one call, the same image once."""

    def __init__(self, worker: WorkerHalf, cache: FeatureCache | None, counts: Counts) -> None:
        self._worker, self._counts = worker, counts
        self.cache = cache

    def encode(self, images: Sequence[ImageInput], wanted: frozenset[str]) -> list[EncodedImage]:
        """One EncodedImage per image, the same object where two inputs are one image.

        `wanted` are the fields of VisualTokens, and the shallow signals, that methods of this call
        read. What is returned is valid until the next call: it may lie in the cache.
        """
        numbers: dict[bytes | int, int] = {}
        source = [
            numbers.setdefault(image.key or place, len(numbers))
            for place, image in enumerate(images)
        ]
        distinct = [images[source.index(number)] for number in range(len(numbers))]
        if self.cache is not None:
            self.cache.hits += len(images) - len(distinct)
        encoded = self._worker.rows(self._features(distinct, tapped(wanted)), wanted)
        return [encoded[number] for number in source]

    def _features(
        self, images: Sequence[ImageInput], wanted: frozenset[str]
    ) -> list[ImageFeatures]:
        """Features with at least the `wanted` signals, from the cache where it has them all."""
        cache = self.cache
        found = [
            cache.get(image.key, wanted) if cache is not None and image.key else None
            for image in images
        ]
        missing = [place for place, entry in enumerate(found) if entry is None]
        if not missing:
            return [
                ImageFeatures(entry, image.size)
                for entry, image in zip(found, images, strict=True)
                if entry is not None
            ]
        asked = wanted
        if cache is not None:
            # What was held of an image stays held, or two methods would displace each other's
            # signals in turn.
            held = frozenset().union(*(cache.names(images[place].key) for place in missing))
            asked = tapped(wanted | held) | self._worker.hook.cheap
        fresh = self._worker.features([images[place] for place in missing], asked)
        self._counts.add(tower_images=len(missing))
        new = dict(zip(missing, fresh, strict=True))
        features = []
        for place, entry in enumerate(found):
            if entry is None:
                features.append(new[place])
            else:
                # A copy: what the cache takes now may lie where this entry is.
                copied = {name: tensor.clone() for name, tensor in entry.items()}
                features.append(ImageFeatures(copied, images[place].size))
        for place, each in new.items():
            if cache is not None and (key := images[place].key):
                cache.put(key, each.tensors)
        return features
