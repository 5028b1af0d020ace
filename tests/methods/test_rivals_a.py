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


def test_a_duplicate_is_picked_last():
    features = torch.eye(6)[[0, 1, 1, 2, 3, 4, 5]]  # tokens 1 and 2 are the same
    signals = {"relevance": torch.ones(7), "saliency": torch.ones(7), "text": torch.eye(6)[:1]}
    for name, options in {
        "divprune": {},
        "cdpruner": {},
        "scope": {},
        "zspaprune": {"core_share": 0.0},
    }.items():
        assert prune(features, budget=6, method=name, **signals, **options).indices.tolist() == [
            0,
            1,
            3,
            4,
            5,
            6,
        ], name


def test_divprune_starts_with_the_lower_of_two_that_are_alone_together():
    angle = torch.tensor([0.0, 0.1, 2.0, 0.2, 2.9, 0.3])  # tokens 2 and 4 are nearest to each other
    assert prune(
        torch.stack([angle.cos(), angle.sin()], -1), budget=1, method="divprune"
    ).indices.tolist() == [2]


def test_what_the_signals_say():
    features = torch.eye(4)
    assert prune(
        features, prototypes=2 * features[1:3], budget=2, method="codebook"
    ).indices.tolist() == [0, 3]
    assert prune(
        features, prototypes=features[[1]], budget=3, method="codebook"
    ).indices.tolist() == [0, 2, 3]
    relevant = {"relevance": torch.tensor([0.1, 0.4, 0.2, 0.3]), "method": "cdpruner"}
    assert prune(features, budget=2, **relevant).indices.tolist() == [
        1,
        3,
    ]  # higher relevance first
    assert prune(features, budget=2, weighting="exp", theta=0.0, **relevant).indices.tolist() == [
        0,
        1,
    ]
    for square, kept in {
        0.9: [0, 2],
        0.5: [1, 2],
    }.items():  # weights 1, 2, 3 by the epsilon; cos(1, 2)^2 = square
        rows = torch.tensor([[1, 0, 0], [0, 1, 0], [0, square**0.5, (1 - square) ** 0.5]])
        relevant["relevance"] = torch.tensor([0, 1e-6, 2e-6])
        assert prune(rows, budget=2, **relevant).indices.tolist() == kept
    near = {"text": torch.tensor([[0.0, 0.0, 1.0, 0.5]]), "method": "zspaprune"}
    assert prune(features, budget=2, core_share=1.0, **near).indices.tolist() == [2, 3]
    assert prune(
        features, text=torch.empty(0, 4), budget=2, method="zspaprune"
    ).indices.tolist() == [0, 1]
    with pytest.raises(ValueError, match="text must have the width of features, 4; got 3"):
        prune(features, text=torch.ones(2, 3), budget=2, method="zspaprune")


def test_holov_hands_on_what_exceeds_a_crop():
    """All saliency in the first of two crops of three: it keeps three, the other gets the rest."""
    saliency = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 0.0])
    for rule in ("paper", "code"):
        options = {"saliency": saliency, "method": "holov", "crops": 2, "gamma": 0.0, "rule": rule}
        assert prune(torch.eye(6), budget=2, **options).indices.tolist() == [1, 2]
        assert prune(torch.eye(6), budget=5, **options).indices.tolist() == [0, 1, 2, 3, 4]


def test_holov_gives_what_rounding_leaves_to_the_heaviest_crop_not_to_the_largest_fraction():
    saliency = torch.tensor([0.30, 0.15, 0.10, 0.05, 0.20, 0.10, 0.06, 0.04])
    assert prune(
        torch.eye(8), saliency=saliency, budget=4, method="holov", crops=2
    ).indices.tolist() == [0, 1, 2, 4]


def test_holov_weighs_crops_of_unequal_length_by_their_mean():
    saliency = torch.tensor([0.17, 0.13, 0.11, 0.09, 0.18, 0.15, 0.12])
    assert prune(
        torch.eye(7), saliency=saliency, budget=3, method="holov", crops=2
    ).indices.tolist() == [0, 4, 5]


def test_holov_scales_the_spread_by_each_crop():
    """The first crop's tokens do not differ, the second's do: over the image its spread would win a
    token.
    """
    features = torch.tensor([[1.0, 0.0]] * 4 + [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    saliency = torch.tensor([0.5, 0.4, 0.3, 0.2, 0.4, 0.3, 0.2, 0.1])
    options = {"saliency": saliency, "budget": 4, "method": "holov", "crops": 2, "gamma": 3.0}
    # Means of saliency 0.35 and 0.25, each times 1 + gamma, as the spread of each crop is scaled to
    # it: 2.33 and 1.67.
    assert prune(features, **options).indices.tolist() == [0, 1, 2, 4]


def test_holov_keeps_the_best_of_a_crop_by_attention_alone():
    features = torch.eye(3)[[0, 1, 2, 0]]
    signals = {
        "saliency": torch.tensor([0.4, 0.3, 0.2, 0.1]),
        "method": "holov",
        "crops": 1,
        "gamma": 9.0,
    }
    assert prune(features, budget=2, **signals).indices.tolist() == [0, 1]
    # By score the two that are alike vary most.
    assert prune(features, budget=2, rule="paper", **signals).indices.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("k", "anchors"), [(25, 0), (75, 2), (125, 2), (175, 4), (225, 4), (64, 1), (192, 4)]
)
def test_hiprune_rounds_anchors_half_to_even(k, anchors):
    """Distant anchors at N = 576, each with four neighbours; everything else by the late layer,
    from the end.
    """
    shallow = torch.zeros(576)
    places = [2 * 24 + 2, 2 * 24 + 7, 2 * 24 + 12, 2 * 24 + 17, 6 * 24 + 2, 6 * 24 + 7]
    shallow[places] = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    got = prune(
        torch.eye(576),
        received=torch.arange(576.0),
        shallow_received=shallow,
        budget=k,
        method="hiprune",
    )
    near = [at + step for at in places[:anchors] for step in (0, -1, 1, -24, 24)]
    assert got.indices.tolist() == sorted(near) + list(range(576 - k + len(near), 576))


def test_hiprune_neighbours_beyond_an_edge():
    """As published the last token of the row above, or clamped to the image; in edges="grid" there
    are none.
    """
    deep = torch.linspace(0, 1, 12)
    for anchor, code, grid in [
        (4, [0, 3, 4, 5, 8], [0, 4, 5, 8, 11]),
        (11, [7, 8, 9, 10, 11], [7, 8, 9, 10, 11]),
    ]:
        shallow = torch.zeros(12)
        shallow[anchor] = 1.0
        signals = {"received": deep, "shallow_received": shallow, "grid": (3, 4)}
        for edges, kept in {"code": code, "grid": grid}.items():
            got = prune(
                torch.eye(12), **signals, budget=5, method="hiprune", alpha=1.0, edges=edges
            )
            assert got.indices.tolist() == kept
    shallow = torch.zeros(12)
    shallow[2] = 1.0  # above it there is nothing: the first token instead
    got = prune(
        torch.eye(12),
        received=deep,
        shallow_received=shallow,
        grid=(3, 4),
        budget=5,
        method="hiprune",
        alpha=1.0,
    )
    assert got.indices.tolist() == [0, 1, 2, 3, 6]


def test_scope_measures_cosines_before_the_projector():
    metric, saliency = torch.eye(4)[[0, 0, 1, 2]], torch.tensor([0.4, 0.3, 0.2, 0.1])
    signals = {"saliency": saliency, "budget": 3, "method": "scope"}
    assert prune(torch.eye(4), metric=metric, **signals).indices.tolist() == [0, 2, 3]
    assert prune(torch.eye(4), **signals).indices.tolist() == [0, 1, 2]
    added = prune(torch.eye(4), metric=metric, combine="sum", heads=2, **signals)
    assert added.indices.tolist() == [
        0,
        2,
        3,
    ]  # gains 2, 2, 1, 1 and 0.8, 0.6, 0.4, 0.2; then 0 + 0.6 < 1 + 0.2
    assert prune(
        torch.eye(4), metric=metric, combine="sum", heads=20, **signals
    ).indices.tolist() == [0, 1, 2]
