"""The two caches alone: bounds in bytes, least recently used out first, and equal decisions from
equal calls.
"""

import random

import pytest
import torch

from fsr_vllm.engine.feature_cache import FeatureCache
from fsr_vllm.engine.pixel_cache import PixelCache
from fsr_vllm.engine.wire import image_key, pack_plan, unpack_plan
from fsr_vllm.params import FieldError, ImagePlan, ServerSettings


def tensors(value, rows=4, signal=True):
    filled = {"tower": torch.full((rows, 16), float(value))}
    return filled | ({"saliency": torch.full((rows,), value + 0.5)} if signal else {})


def holds(cache, key, value, rows=4, signal=True):
    entry = cache.get(key, {"tower"})
    return entry is not None and all(
        torch.equal(entry[n], t) for n, t in tensors(value, rows, signal).items()
    )


def test_what_was_put_comes_back_until_it_was_used_longest_ago():
    cache = FeatureCache(3 * 512)
    for number in range(3):
        cache.put(bytes([number]), tensors(number))
    assert holds(cache, bytes([0]), 0)
    cache.put(b"new", tensors(9))
    assert holds(cache, bytes([0]), 0) and holds(cache, bytes([2]), 2) and holds(cache, b"new", 9)
    assert cache.get(bytes([1]), {"tower"}) is None
    assert cache.stats() == {
        "feature_hits": 4,
        "feature_misses": 1,
        "feature_evictions": 1,
        "feature_entries": 3,
        "feature_bytes": 3 * 512,
        "feature_capacity_bytes": 3 * 512,
    }


def test_an_entry_without_a_wanted_signal_is_a_miss_and_is_replaced():
    cache = FeatureCache(4096)
    cache.put(b"a", tensors(1, signal=False))
    assert cache.get(b"a", {"tower", "saliency"}) is None and cache.names(b"a") == {"tower"}
    cache.put(b"a", tensors(2))
    assert cache.get(b"a", {"tower", "saliency"}) is not None and holds(cache, b"a", 2)
    assert cache.stats()["feature_bytes"] == 512 and cache.stats()["feature_entries"] == 1


def test_larger_than_the_cache_stays_out_and_leaves_the_others():
    cache = FeatureCache(1024)
    cache.put(b"a", tensors(1))
    cache.put(b"b", tensors(2, rows=64))
    assert holds(cache, b"a", 1) and cache.get(b"b", {"tower"}) is None


def test_clear_gives_all_bytes_back():
    cache = FeatureCache(1024)
    for number in range(5):
        cache.put(bytes([number]), tensors(number))
    cache.clear()
    assert cache.stats()["feature_bytes"] == 0 and cache.get(bytes([4]), {"tower"}) is None
    cache.put(b"x", tensors(1))
    cache.put(b"y", tensors(2))
    assert holds(cache, b"x", 1) and holds(cache, b"y", 2)


@pytest.mark.parametrize("seed", range(5))
def test_entries_of_any_size_never_overlap_and_two_ranks_decide_alike(seed):
    """The second rank has other values (another shard's rounding) but the same keys and sizes in
    the same order.
    """
    chance = random.Random(seed)
    capacity = 20_000
    ranks = [FeatureCache(capacity), FeatureCache(capacity)]
    sizes = {}
    for _ in range(600):
        key = bytes([chance.randrange(30)])
        if chance.random() < 0.02:
            [cache.clear() for cache in ranks]
            sizes.clear()
        found = [cache.get(key, {"tower"}) is not None for cache in ranks]
        assert found[0] == found[1]
        if found[0] and chance.random() < 0.8:
            rows, signal = sizes[key]
            assert holds(ranks[0], key, key[0], rows, signal) and holds(
                ranks[1], key, key[0] + 0.25, rows, signal
            )
            continue
        sizes[key] = (chance.choice((1, 4, 30, 90, 400)), chance.random() < 0.5)
        for cache, value in zip(ranks, (key[0], key[0] + 0.25), strict=True):
            cache.put(key, tensors(value, *sizes[key]))
        assert ranks[0].stats() == ranks[1].stats()
        assert ranks[0].stats()["feature_bytes"] <= capacity
    assert ranks[0].stats()["feature_evictions"] > 10


def test_the_whole_block_is_there_from_the_start_and_never_grows():
    """vLLM sizes its KV cache from the memory a worker has in use after the model was made."""
    cache = FeatureCache(1 << 20)
    storage = cache._block.untyped_storage()
    assert storage.nbytes() == 1 << 20
    for number in range(100):
        cache.put(bytes([number]), tensors(number, rows=512))
    places = {t.untyped_storage().data_ptr() for t in cache.get(bytes([99]), {"tower"}).values()}
    assert places == {storage.data_ptr()}


def test_pixels_are_bounded_by_bytes():
    cache = PixelCache(100)
    cache.put(b"a", "A", 60)
    cache.put(b"b", "B", 40)
    assert cache.get(b"a") == "A"
    cache.put(b"c", "C", 30)
    assert cache.get(b"b") is None and cache.get(b"a") == "A" and cache.get(b"c") == "C"
    cache.put(b"a", "A2", 10)
    cache.put(b"huge", "H", 101)
    assert cache.get(b"a") == "A2" and cache.get(b"huge") is None
    assert cache.stats() == {
        "pixel_hits": 4,
        "pixel_misses": 2,
        "pixel_entries": 2,
        "pixel_bytes": 40,
    }
    cache.clear()
    assert cache.stats()["pixel_bytes"] == 0 and cache.get(b"c") is None


def test_keys_travel_with_plans():
    plan = ImagePlan(576, 64, "fsr", "{}", "Wer? 旗")
    assert unpack_plan(pack_plan(image_key("a"), plan)) == (image_key("a"), plan)
    assert unpack_plan(pack_plan(None, plan)) == (None, plan)
    assert image_key("a") != image_key("b") and len(image_key("a")) == 16


@pytest.mark.parametrize("name", ["feature_cache_bytes", "pixel_cache_bytes"])
def test_bounds_are_bytes(name):
    assert getattr(ServerSettings.parse({name: 0}), name) == 0
    for wrong in (-1, 1.5, True, "1GiB", None, 1 << 41):
        with pytest.raises(FieldError, match="bytes") as error:
            ServerSettings.parse({name: wrong})
        assert error.value.field == f"fsr.{name}"
