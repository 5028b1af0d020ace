"""Encoder and selection on a fake family: features -> rows -> select -> finish, in milliseconds."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsr_vllm.engine import selection
from fsr_vllm.engine.encoder import Encoder
from fsr_vllm.engine.feature_cache import FeatureCache
from fsr_vllm.engine.groups import split
from fsr_vllm.engine.selection import Inputs, Selector, wanted
from fsr_vllm.engine.stats import Counts
from fsr_vllm.params import ImagePlan
from fsr_vllm.params.method import build_method

from .fake import FakeWorker, image, total


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(selection, "tensor_parallel_size", lambda: 1)


def plan(n, keep, method="fastervlm", question="", **options):
    made = json.dumps(build_method(method, options or None).__dict__, sort_keys=True)
    return ImagePlan(n, keep, method, made, question)


class Room:
    """Encoder and selector of one fake worker, as `Pruner` joins them."""

    def __init__(self, cache=0, **inputs):
        self.worker, self.counts = FakeWorker(), Counts()
        self.encoder = Encoder(self.worker, FeatureCache(cache) if cache else None, self.counts)
        self.selector = Selector(self.worker, Inputs(**inputs), self.counts)

    def embed(self, *images):
        plans = [each.plan for each in images]
        encoded = self.encoder.encode(images, wanted(plans))
        pruned = self.selector.select(encoded, plans)
        rows = [self.worker.finish(one, kept) for one, kept in zip(encoded, pruned, strict=True)]
        return encoded, pruned, rows


# --- the way of an image -------------------------------------------------------------------------


def test_two_images_of_different_size_without_a_square_grid():
    shapes = [(2, (2, 5)), (1, (3, 4))]
    images = [
        image(*shape, plan(total(*shape), keep), seed=place)
        for place, (shape, keep) in enumerate(zip(shapes, (7, 5), strict=True))
    ]
    encoded, pruned, rows = Room().embed(*images)
    for one, kept, row, shape, keep in zip(encoded, pruned, rows, shapes, (7, 5), strict=True):
        assert row.shape == (keep, 6) and len(one.rows) == total(*shape)
        assert kept.indices.tolist() == sorted(set(kept.indices.tolist()))
        assert torch.equal(row, one.rows[kept.indices])
        assert (one.patches[kept.indices, 0] >= 0).all()  # newlines are no candidates
    tiles = encoded[0].patches[pruned[0].indices, 0].tolist()
    assert tiles.count(0) == 4 and tiles.count(1) == 3
    # Of each tile the rows of highest saliency: the sum of the tile's own features.
    for tile, keep in ((0, 4), (1, 3)):
        best = images[0].pixels["tiles"][tile].sum(-1).topk(keep).indices.sort().values
        mine = encoded[0].patches[pruned[0].indices]
        assert mine[mine[:, 0] == tile][:, 1].tolist() == best.tolist()


def test_a_budget_above_the_candidates_takes_the_first_newlines():
    shape = (2, (2, 3))  # 12 patches, 4 newlines
    one = image(*shape, plan(total(*shape), 14))
    encoded, pruned, rows = Room().embed(one)
    newlines = (encoded[0].patches[:, 0] < 0).nonzero()[:, 0].tolist()
    expected = sorted(set(range(16)) - set(newlines[2:]))
    assert pruned[0].indices.tolist() == expected
    assert torch.equal(rows[0], encoded[0].rows[expected])
    assert pruned[0].is_focus.all() and (pruned[0].merged_into == -1).all()


def test_joint_tiles_are_one_set_of_tokens():
    shape = (3, (2, 3))
    n = total(*shape)
    apart = plan(n, 7)
    joint = replace(apart, tiles="joint")
    one, other = image(*shape, apart), image(*shape, joint)
    encoded, pruned, rows = Room().embed(one, other)
    known = one.pixels["tiles"].sum(-1).flatten()  # saliency of all patches
    best = set(known.topk(7).indices.tolist())
    places = encoded[1].patches[pruned[1].indices]
    assert {int(tile) * 6 + int(patch) for tile, patch in places} == best
    assert torch.equal(rows[1], encoded[1].rows[pruned[1].indices])
    tiles = encoded[0].patches[pruned[0].indices, 0].tolist()
    assert [tiles.count(tile) for tile in range(3)] == [3, 2, 2]
    assert not torch.equal(pruned[0].indices, pruned[1].indices)


def test_a_joint_budget_above_all_candidates_takes_newlines_too():
    shape = (2, (2, 3))  # 12 patches, 4 newlines
    joint = replace(plan(total(*shape), 14), tiles="joint")
    encoded, pruned, _ = Room().embed(image(*shape, joint))
    newlines = (encoded[0].patches[:, 0] < 0).nonzero()[:, 0].tolist()
    assert pruned[0].indices.tolist() == sorted(set(range(16)) - set(newlines[2:]))


def test_what_is_merged_is_told_as_places_of_the_image():
    shape = (2, (3, 4))
    one = image(*shape, plan(total(*shape), 10, "avgpool"))
    encoded, pruned, _ = Room().embed(one)
    merged = pruned[0].merged_into
    places = merged.ge(0).nonzero()[:, 0].tolist()
    assert places and set(merged[places].tolist()) <= set(pruned[0].indices.tolist())
    tile = encoded[0].patches[:, 0]
    assert all(tile[place] == tile[merged[place]] for place in places)
    assert int(pruned[0].num_merged) == len(places)


def test_unpruned_images_keep_all_rows_in_memory_of_their_own():
    shape = (1, (2, 3))
    pruned_one = image(*shape, plan(total(*shape), 3), key=b"k" * 16)
    whole = image(*shape, ImagePlan(total(*shape), total(*shape)), key=b"k" * 16)
    encoded, pruned, rows = Room().embed(pruned_one, whole, whole)
    assert pruned[1] is None and torch.equal(rows[1], encoded[1].rows)
    rows[1].zero_()
    assert not torch.equal(rows[1], rows[2]) and torch.equal(rows[2], encoded[2].rows)


def test_relevance_goes_the_way_of_the_rows():
    shape, asked = (1, (2, 4)), []

    class Text:
        per_patch = True

        def relevance(self, tower, rows, questions):
            asked.append((tuple(tower.shape), tuple(rows.shape), list(questions)))
            return tower[..., 0]

    room = Room(relevance=Text())
    named = plan(total(*shape), 3, "relevance", "what?")
    silent = plan(total(*shape), 3, "relevance", "")
    encoded, pruned, _ = room.embed(
        image(*shape, named), image(*shape, silent, seed=1), image(*shape, named, seed=2)
    )
    assert asked == [((2, 8, 6), (2, 10, 6), ["what?", "what?"])]
    for place in (0, 2):
        patches = encoded[place].patches[pruned[place].indices]
        assert (patches[:, 0] == 0).all()
        best = encoded[place].tower[:, 0].topk(3).indices.sort().values
        assert patches[:, 1].tolist() == best.tolist()
    assert pruned[1].indices.tolist() == [0, 1, 2]  # without a question all are alike


def test_a_question_that_a_method_reads_itself_is_one_input_of_one_call():
    class Words:
        def embeddings(self, text):
            return torch.full((2, 6), float(len(text)))

    shape, seen = (1, (2, 3)), []
    room = Room(words=Words())
    stock = room.selector._tokens
    room.selector._tokens = lambda *args: seen.append(stock(*args)) or seen[-1]
    plans = [plan(total(*shape), 3, "zspaprune", text) for text in ("a", "bbb", "a")]
    room.embed(*(image(*shape, each, seed=place) for place, each in enumerate(plans)))
    assert sorted((len(each.features), float(each.text[0, 0])) for each in seen) == [
        (1, 3.0),
        (2, 1.0),
    ]


def test_images_of_one_kind_are_pruned_in_one_call_and_counted():
    shape = (1, (2, 3))
    n = total(*shape)
    room = Room()
    room.embed(
        image(*shape, plan(n, 3, question="what?")),
        image(*shape, plan(n, 3, question="who?"), seed=1),  # of no matter to this method
        image(*shape, plan(n, 2), seed=2),
        image(*shape, ImagePlan(n, n), seed=3),
    )
    counts = room.counts.read()
    assert (counts["images"], counts["pruned_images"], counts["selection_calls"]) == (4, 3, 2)
    assert counts["kept"] == 8 and counts["tower_images"] == 4 and counts["num_merged"] == 0


# --- the cache -----------------------------------------------------------------------------------


def test_the_same_image_is_encoded_once_in_a_call_and_not_again():
    shape, key = (1, (2, 3)), b"a" * 16
    n = total(*shape)
    room = Room(cache=1 << 16)
    first = room.embed(image(*shape, plan(n, 3), key), image(*shape, plan(n, 2), key))
    assert room.worker.runs == [(1, frozenset({"saliency"}))] and room.encoder.cache.hits == 1
    again = room.embed(image(*shape, plan(n, 3), key))
    assert len(room.worker.runs) == 1 and torch.equal(first[2][0], again[2][0])
    room.embed(image(*shape, plan(n, 3), None))
    assert len(room.worker.runs) == 2  # without a key nothing is kept


def test_what_was_held_of_an_image_stays_held():
    shape, key = (1, (2, 3)), b"a" * 16
    n = total(*shape)
    room = Room(cache=1 << 16)
    for method in ("fastervlm", "hiprune", "fastervlm"):
        room.encoder.encode([image(*shape, plan(n, 3, method), key)], wanted([plan(n, 3, method)]))
    assert [names for _, names in room.worker.runs] == [
        {"saliency"},
        {"saliency", "received", "shallow_received@8"},
    ]


def test_a_hit_beside_a_miss_is_not_overwritten_by_it():
    shape = (1, (2, 3))
    n = total(*shape)
    one = [image(*shape, plan(n, 3), bytes([place]) * 16, seed=place) for place in range(3)]
    room = Room(cache=3 * 256)  # one image: tower, grid and saliency, each aligned
    alone = [Room().embed(each)[2][0] for each in one]
    room.embed(one[0])
    encoded, _, rows = room.embed(one[0], one[1])
    assert torch.equal(rows[0], alone[0]) and torch.equal(rows[1], alone[1])
    assert torch.equal(
        encoded[0].signals["saliency"], Room().embed(one[0])[0][0].signals["saliency"]
    )
    assert room.encoder.cache.stats()["feature_evictions"] == 1


# --- a budget over groups ------------------------------------------------------------------------


@given(st.integers(0, 60), st.lists(st.integers(0, 12), min_size=1, max_size=6))
def test_a_budget_is_split_evenly_and_exactly(keep, sizes):
    given_ = split(keep, sizes)
    assert sum(given_) == min(keep, sum(sizes))
    assert all(0 <= each <= size for each, size in zip(given_, sizes, strict=True))
    open_ = [each for each, size in zip(given_, sizes, strict=True) if each < size]
    if open_:  # nobody that could take more has less than the others, but for one left over
        assert max(given_) - min(open_) <= 1
        places = [place for place, size in enumerate(sizes) if given_[place] < size]
        assert [given_[place] for place in places] == sorted(
            (given_[place] for place in places), reverse=True
        )


def test_a_budget_smaller_than_the_groups_goes_to_the_first():
    assert split(2, [5, 5, 5]) == [1, 1, 0]
    assert split(7, [5, 5, 5]) == [3, 2, 2]
    assert split(9, [1, 0, 8, 8]) == [1, 0, 4, 4]
    assert split(100, [3, 2]) == [3, 2]
