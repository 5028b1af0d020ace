"""The controls: what each keeps, exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsr_vllm import prune
from fsr_vllm.methods.ops import region_bounds, regions, square_grid, topk_stable

from .default_methods import quick

grids = st.tuples(st.integers(1, 12), st.integers(1, 12)).filter(lambda grid: grid[0] * grid[1] > 1)


def raster(h, w):
    return torch.arange(float(h * w))[:, None].repeat(1, 2)


def test_none_is_truncation():
    assert prune(raster(4, 5), budget=7, method="truncate").indices.tolist() == list(range(7))


def test_relevance_keeps_the_most_relevant():
    relevance = torch.tensor([0.1, 0.5, -0.3, 0.5, 0.2, 0.5])
    assert prune(
        raster(2, 3), relevance=relevance, budget=2, method="relevance"
    ).indices.tolist() == [1, 3]


def test_fastervlm_keeps_the_most_attended():
    saliency = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.9, 0.5])
    assert prune(
        raster(2, 3), saliency=saliency, budget=3, method="fastervlm"
    ).indices.tolist() == [1, 2, 4]


def test_random_is_one_draw_per_seed_whatever_the_batch():
    features = torch.randn(3, 50, 2)
    out = prune(features, budget=20, method="random")
    assert (out.indices == out.indices[0]).all()
    assert torch.equal(out.indices[1], prune(features[1], budget=20, method="random").indices)
    assert not torch.equal(out.indices, prune(features, budget=20, method="random", seed=1).indices)
    torch.manual_seed(99)  # the global generator plays no part, and is left alone
    state = torch.get_rng_state()
    assert torch.equal(out.indices, prune(features, budget=20, method="random").indices)
    assert torch.equal(state, torch.get_rng_state())
    fewer = prune(features[0], budget=5, method="random").indices.tolist()
    assert set(fewer) <= set(out.indices[0].tolist())
    counts = torch.zeros(50)
    for seed in range(200):
        counts[prune(features[0], budget=20, method="random", seed=seed).indices] += 1
    assert counts.min() > 40 and counts.max() < 120  # 80 expected


def test_uniform_without_a_grid_is_evenly_spaced():
    assert prune(raster(1, 10), budget=5, method="uniform").indices.tolist() == [0, 2, 4, 6, 8]
    assert prune(raster(1, 9), budget=3, method="uniform").indices.tolist() == [1, 4, 7]
    gaps = prune(raster(1, 577), budget=64, method="uniform").indices.diff()
    assert gaps.min() == 9 and gaps.max() <= 10


def test_uniform_on_a_grid_is_even_in_both_directions():
    assert prune(raster(6, 6), budget=4, method="uniform", grid=(6, 6)).indices.tolist() == [
        7,
        10,
        25,
        28,
    ]
    with pytest.raises(ValueError, match=r"^grid must be \(h, w\) with h \* w = N = 36"):
        prune(raster(6, 6), budget=4, method="uniform", grid=(5, 7))
    for bad in ((6,), "66", (6.0, 6.0), (-6, -6), 36):
        with pytest.raises(ValueError, match="^grid must"):
            prune(raster(6, 6), budget=4, method="uniform", grid=bad)


@given(grid=grids, data=st.data())
@quick
def test_regions_are_rectangles_that_partition_the_grid(grid, data):
    h, w = grid
    k = data.draw(st.integers(1, h * w))
    region = regions(k, grid, torch.device("cpu"))
    assert region.bincount().shape == (k,) and (region.bincount() > 0).all()
    plane = region.view(h, w)
    bounds = torch.stack(region_bounds(k, grid, torch.device("cpu")), 1).tolist()
    for number, (top, bottom, left, right) in enumerate(bounds):
        assert (plane[top:bottom, left:right] == number).all()
        assert (bottom - top) * (right - left) == (region == number).sum()
    assert region.bincount().max() <= 4 * max(1, h * w // k)


def test_regions_of_the_usual_sizes_are_even():
    for k, size in ((64, 9), (144, 4), (36, 16), (576, 1)):
        assert (regions(k, (24, 24), torch.device("cpu")).bincount() == size).all()


def test_avgpool_is_pooling_where_that_is_exact():
    features = torch.randn(2, 576, 3, generator=torch.Generator().manual_seed(0))
    out = prune(features, budget=64, method="avgpool")
    image = features.mT.view(2, 3, 24, 24)
    torch.testing.assert_close(out.tokens, torch.nn.functional.avg_pool2d(image, 3).flatten(2).mT)
    assert (
        out.indices[0, :3].tolist() == [0, 3, 6] and out.indices[0, 8] == 72
    )  # the first token of each square
    assert (out.num_merged == 576 - 64).all() and out.is_focus.all()


def test_avgpool_rows_stand_at_their_most_salient_token():
    saliency = torch.tensor([0.0, 1.0, 2.0, 2.0, 5.0, 0.0, 0.0, 0.0, 1.0, 9.0, 3.0, 3.0])
    out = prune(raster(2, 6), saliency=saliency, budget=2, method="avgpool", grid=(2, 6))
    assert out.indices.tolist() == [2, 9]  # of columns 0-2: 2 before 8; of columns 3-5: 9
    assert out.tokens[:, 0].tolist() == [4.0, 7.0]
    assert out.merged_into.tolist() == [2, 2, -1, 9, 9, 9, 2, 2, 2, -1, 9, 9]
    one = prune(raster(2, 6), saliency=saliency, budget=1, method="avgpool")
    assert one.indices.tolist() == [9] and one.tokens[0, 0] == 5.5


def test_avgpool_orders_rows_by_place():
    saliency = torch.tensor(
        [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    )  # the left column's place comes after the right's
    out = prune(raster(2, 4), saliency=saliency, budget=2, method="avgpool", grid=(2, 4))
    assert out.indices.tolist() == [2, 4] and out.tokens[:, 0].tolist() == [4.5, 2.5]


def test_small_helpers():
    assert square_grid(576) == (24, 24) and square_grid(577) == (1, 577)
    assert topk_stable(torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]]), 3).tolist() == [[1, 2, 4]]
