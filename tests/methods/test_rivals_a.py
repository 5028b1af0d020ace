"""CDPruner, DivPrune, SCOPE, ZSPAPrune, codebook, HiPrune, HoloV and VScan against their rules
written out.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fsr_vllm.methods import VisualTokens, get_method, prune

from . import reference_a as reference

GRIDS = [(3, 3), (3, 4), (5, 6), (7, 4), (2, 10)]
NARROW = 2e-5  # float32 decides like float64 where the margin is above this


def inputs(grid, seed, d=None):
    """Random signals of one image in float32, and rows with a common part, as features of an image
    have.
    """
    rng = np.random.default_rng([*grid, seed])
    n = grid[0] * grid[1]
    d = d or 2 * n
    return {
        "features": (rng.normal(size=(n, d)) + rng.normal(size=d)).astype(np.float32),
        "saliency": rng.lognormal(sigma=0.5, size=n).astype(np.float32),
        "shallow_saliency": rng.lognormal(sigma=0.5, size=n).astype(np.float32),
        "received": rng.lognormal(sigma=0.5, size=n).astype(np.float32),
        "shallow_received": rng.lognormal(sigma=0.5, size=n).astype(np.float32),
        "metric": (rng.normal(size=(n, d + 3)) + rng.normal(size=d + 3)).astype(np.float32),
        "relevance": rng.normal(size=n).astype(np.float32) * 0.1,
        "text": rng.normal(size=(4, d)).astype(np.float32),
        "prototypes": rng.normal(size=(6, d)).astype(np.float32),
    }


def compare(name, needs, grid, k, /, **options):
    """The method and its rule choose the same for two images, neither decided narrowly."""
    compared = 0
    for seed in range(40):
        given = inputs(grid, seed)
        places = [grid] if name in ("hiprune", "vscan") else []
        margin: list[float] = []
        exact = (given[need].astype(np.float64) for need in needs)
        wanted = getattr(reference, name)(*exact, *places, k, margin, **options)
        if min(margin, default=1.0) < NARROW:
            continue
        signals = {
            key: torch.from_numpy(value)
            for key, value in given.items()
            if key in needs or key == "features"
        }
        got = prune(**signals, grid=grid, budget=k, method=name, **options)
        if name == "vscan":
            wanted, rows, into = wanted
            assert got.merged_into.tolist() == into
            np.testing.assert_allclose(got.tokens.numpy(), rows, rtol=1e-5, atol=1e-6)
        assert got.indices.tolist() == wanted
        compared += 1
        if compared == 2:
            return
    pytest.fail("no inputs without near-ties found")


SIZES = [
    ((h, w), k)
    for h, w in GRIDS
    for n in [h * w]
    for k in sorted({1, 2, n // 3, n // 2, n - 2, n - 1})
]
each_size = pytest.mark.parametrize(("grid", "k"), SIZES, ids=str)


@each_size
@pytest.mark.parametrize(
    "options", [{}, {"weighting": "exp", "theta": 0.3}, {"weighting": "exp", "theta": 0.8}], ids=str
)
def test_cdpruner(grid, k, options):
    compare("cdpruner", ("features", "relevance"), grid, k, **options)


@pytest.mark.parametrize("scope", ["group", "row"])
def test_cdpruner_scales_over_the_tiles_of_an_image(scope):
    tiles = [inputs((4, 5), seed) for seed in range(2)]
    stack = {
        name: torch.from_numpy(np.stack([tile[name] for tile in tiles]))
        for name in ("features", "relevance")
    }
    stack["relevance"][1] += 5
    got = prune(**stack, group=torch.tensor([7, 7]), budget=6, method="cdpruner", norm_scope=scope)
    among, features = stack["relevance"].double().numpy(), stack["features"].double().numpy()
    for b in range(2):
        joint = among if scope == "group" else None
        assert got.indices[b].tolist() == reference.cdpruner(
            features[b], among[b], 6, [], among=joint
        )


@each_size
def test_divprune(grid, k):
    compare("divprune", ("features",), grid, k)


@each_size
@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.0}, {"alpha": 2.0}, {"combine": "sum", "heads": 2}], ids=str
)
@pytest.mark.parametrize("space", ["features", "metric"])
def test_scope(grid, k, options, space):
    compare("scope", (space, "saliency"), grid, k, **options)


@each_size
@pytest.mark.parametrize("share", [0.6, 0.0, 0.25, 1.0])
def test_zspaprune(grid, k, share):
    compare("zspaprune", ("features", "text"), grid, k, core_share=share)


@each_size
def test_codebook(grid, k):
    compare("codebook", ("features", "prototypes"), grid, k)


@each_size
@pytest.mark.parametrize("alpha", [0.1, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("edges", ["code", "grid"])
def test_hiprune(grid, k, alpha, edges):
    compare("hiprune", ("received", "shallow_received"), grid, k, alpha=alpha, edges=edges)


HOLOV = [
    {},
    {"rule": "paper"},
    {"crops": 4},
    {"crops": 4, "rule": "paper"},
    {"crops": 0},
    {"gamma": 1.0, "tau": 2.0},
]


@each_size
@pytest.mark.parametrize("options", HOLOV, ids=str)
def test_holov(grid, k, options):
    compare("holov", ("features", "saliency"), grid, k, **options)


@each_size
@pytest.mark.parametrize("window", [6, 2, 3])
def test_vscan(grid, k, window):
    compare("vscan", ("features", "saliency", "shallow_saliency"), grid, k, window=window)


def test_vscan_windows_of_llava():
    """24 x 24 tokens in 16 windows, 2 local ones from each at K = 64; float64 stays float64."""
    needs = ("features", "saliency", "shallow_saliency")
    rng = np.random.default_rng(0)
    given = {
        need: torch.from_numpy(rng.random((576, 8) if need == "features" else 576))
        for need in needs
    }
    kept, rows, into = reference.vscan(*(given[need].numpy() for need in needs), (24, 24), 64, [])
    got = prune(**given, budget=64, method="vscan")
    assert got.indices.tolist() == kept and got.merged_into.tolist() == into
    np.testing.assert_allclose(got.tokens.numpy(), rows)
    bare = prune(**given, budget=64, method="vscan", merge=False)
    assert bare.indices.tolist() == kept and bare.num_merged == 0
    assert torch.equal(bare.tokens, given["features"][kept])


@pytest.mark.parametrize(
    "name", ["cdpruner", "divprune", "scope", "zspaprune", "codebook", "hiprune", "holov", "vscan"]
)
@pytest.mark.parametrize("k", [1, 5, 19])
def test_a_batch_is_its_images_also_where_they_are_degenerate(name, k):
    """Random, duplicate, constant and zero images of half precision in one batch; K distinct tokens
    of each.
    """
    images = [inputs((4, 5), seed, d=48) for seed in range(5)]
    images[1]["features"][10:] = images[1]["features"][:10]
    images[2] = {key: np.ones_like(value) for key, value in images[2].items()}
    images[3] = {key: np.zeros_like(value) for key, value in images[3].items()}
    method = get_method(name)
    stack = {
        need: torch.from_numpy(np.stack([i[need] for i in images])).half()
        for need in ("features", *method.needs)
    }
    together = method.prune(VisualTokens(**stack, grid=(4, 5)), k)
    assert (together.indices.diff(dim=1) > 0).all()
    for b in range(5):
        alone = method.prune(
            VisualTokens(**{need: value[b] for need, value in stack.items()}, grid=(4, 5)), k
        )
        assert torch.equal(alone.indices, together.indices[b]) and torch.equal(
            alone.tokens, together.tokens[b]
        )
