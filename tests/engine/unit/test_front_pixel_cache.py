"""The pixel cache alone: a bound in bytes, and what was used longest ago goes first."""

import threading

import pytest

from fsr_vllm.engine.pixel_cache import PixelCache


def holding(*entries, capacity=100):
    cache = PixelCache(capacity)
    for key, size in entries:
        cache.put(key, key.decode().upper(), size)
    return cache


def held(cache, keys=(b"a", b"b", b"c")):
    return [key for key in keys if cache.get(key) is not None]


def test_what_was_used_longest_ago_makes_room():
    cache = holding((b"a", 60), (b"b", 40))
    assert cache.get(b"a") == "A"
    cache.put(b"c", "C", 30)
    assert held(cache) == [b"a", b"c"]


def test_an_image_as_large_as_the_cache_is_kept_and_a_larger_one_stays_out():
    assert held(holding((b"a", 10), (b"b", 100))) == [b"b"]
    cache = holding((b"a", 10), (b"b", 101))
    assert held(cache) == [b"a"]
    cache.put(b"a", "A2", 101)
    assert cache.get(b"a") == "A"


@pytest.mark.parametrize("size", [10, 60, 90])
def test_a_new_value_takes_the_place_of_the_old_one(size):
    cache = holding((b"a", 60), (b"b", 10))
    cache.put(b"a", "A2", size)
    assert cache.get(b"a") == "A2" and cache.get(b"b") == "B"
    assert cache.stats()["pixel_bytes"] == size + 10


def test_statistics_count_what_was_asked_for():
    cache = holding((b"a", 60), (b"b", 10))
    assert held(cache) == [b"a", b"b"]
    counted = {"pixel_hits": 2, "pixel_misses": 1}
    assert cache.stats() == counted | {"pixel_entries": 2, "pixel_bytes": 70}
    cache.clear()
    assert cache.stats() == counted | {"pixel_entries": 0, "pixel_bytes": 0}
    assert held(cache) == [] and cache.stats()["pixel_misses"] == 4


def test_a_prompts_images_are_looked_up_once_each():
    cache = holding((b"a", 1), (b"b", 1))
    assert cache.look_up([b"c", b"a", b"c", b"a", b"d"]) == ({b"a": "A"}, [0, 4])
    assert cache.stats()["pixel_hits"] == 1 and cache.stats()["pixel_misses"] == 2
    assert cache.look_up([]) == ({}, [])


def test_threads_never_take_it_beyond_its_bytes():
    cache = PixelCache(50)
    over = []

    def work(seed):
        for number in range(300):
            key = bytes([(number * seed) % 40])
            if cache.get(key) is None:
                cache.put(key, key, number % 20)
            over.append(cache.stats()["pixel_bytes"] > 50)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (3, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = cache.stats()
    assert len(over) == 900 and not any(over)
    assert stats["pixel_hits"] + stats["pixel_misses"] == 900
