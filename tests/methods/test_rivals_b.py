"""VisPruner, VisionZip, VisionDrop, PruMerge, VFlowOpt, QuoTA and four probes against their rules
written out.
"""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest
import torch

from fsr_vllm.methods import prune

from . import reference_b as reference

GRIDS = [(3, 3), (7, 4), (2, 10)]
NARROW = 2e-6  # float32 decides like float64 where the margin is above this


def inputs(grid, seed):
    """Random signals of one image in float32, and rows with a common part, as features of an image
    have.
    """
    rng = np.random.default_rng([*grid, seed])
    n = grid[0] * grid[1]
    probe, attention = rng.normal(size=(n, n + 4)), rng.normal(size=(n, n)) + 2 * rng.normal(size=n)
    given = {
        "features": rng.normal(size=(n, 12)) + rng.normal(size=12),
        "metric": rng.normal(size=(n, 10)) + rng.normal(size=10),
        "saliency": rng.lognormal(sigma=0.5, size=n),
        "keys": rng.normal(size=(n, 7)),
        "cls_row": rng.normal(size=12),
        "last_query": rng.normal(size=9),
        "last_key": rng.normal(size=(n + 1, 9)),
        "attention": np.exp(attention) / np.exp(attention).sum(1, keepdims=True),
        "frame_weights": rng.random(grid[0]),
        "text": rng.normal(size=(5, 12)),
        "probe": np.exp(probe) / np.exp(probe).sum(0),
    }
    return {key: value.astype(np.float32) for key, value in given.items()}


def budgets(n):
    return sorted({1, 2, n // 3, n // 2, n - 1})


def compare(name, rule, fields, grid, k, probe=None, **options):
    """The method and its rule choose, and merge, the same on two images, none of which was decided
    narrowly.
    """
    compared = 0
    for seed in count():
        assert seed < 60, "no input without near-ties found"
        given = inputs(grid, seed)
        if "probe" in fields:
            given["probe"] = given["probe"][:, probe]
        given = {key: given[key] for key in dict.fromkeys(("features", *fields))}
        margin: list[float] = []
        wanted = rule({key: value.astype(np.float64) for key, value in given.items()}, margin)
        if min(margin, default=1.0) < NARROW:
            continue
        signals = {
            key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in given.items()
        }
        got = prune(**signals, grid=grid, budget=k, method=name, **options)
        if isinstance(wanted, list):
            assert got.indices.tolist() == wanted and got.num_merged == 0
            assert torch.equal(got.tokens, signals["features"][wanted])
        else:
            assert got.indices.tolist() == wanted[0] and got.merged_into.tolist() == wanted[2]
            assert got.num_merged == sum(target >= 0 for target in wanted[2])
            np.testing.assert_allclose(got.tokens.numpy(), wanted[1], rtol=2e-5, atol=2e-6)
        compared += 1
        if compared == 2:
            return


PRUMERGE = [{}, {"variant": "base"}, {"neighbours": 3}, {"variant": "base", "neighbours": 0}]
each_size = pytest.mark.parametrize(
    ("grid", "k"), [(g, k) for g in GRIDS for k in budgets(g[0] * g[1])], ids=str
)


@each_size
@pytest.mark.parametrize(("ratio", "step"), [(0.5, 8), (0.75, 3), (0.0, 1), (0.3, 50), (1.0, 8)])
@pytest.mark.parametrize("space", ["metric", "features"])
def test_vispruner(grid, k, ratio, step, space):

    def rule(x, margin):
        return reference.vispruner(x["saliency"], x[space], k, margin, ratio, step)

    compare("vispruner", rule, ("saliency", space), grid, k, ratio=ratio, step=step)


@each_size
@pytest.mark.parametrize(("name", "share", "options"), [
    ("visionzip", 10 / 64, {}),
    ("visiondrop", 6 / 48, {}),
    ("visionzip", 0.0, {"contextual_share": 0.0}),
    ("visiondrop", 0.6, {"contextual_share": 0.6}),
])  # fmt: skip
@pytest.mark.parametrize("cls", [True, False])
def test_visionzip(grid, k, name, share, options, cls):
    fields = ("saliency", "keys", "cls_row")[: 2 + cls]

    def rule(x, margin):
        rows = (x["features"], x["saliency"], x["keys"], x.get("cls_row"))
        return reference.visionzip(*rows, k, margin, share)

    compare(name, rule, fields, grid, k, **options)


@each_size
@pytest.mark.parametrize("options", PRUMERGE, ids=str)
def test_prumerge(grid, k, options):

    def rule(x, margin):
        return reference.prumerge(
            x["features"], x["last_query"], x["last_key"], k, margin, **options
        )

    compare("prumerge", rule, ("last_query", "last_key"), grid, k, **options)


@each_size
@pytest.mark.parametrize(
    ("threshold", "cell"), [(34.76, 15.58), (1.0, 2.0), (0.0, 1.5), (1.5, 3.0), (2.0, 1.0)]
)
def test_vflowopt(grid, k, threshold, cell):

    def rule(x, margin):
        return reference.vflowopt(x["features"], x["attention"], grid, k, margin, threshold, cell)

    compare("vflowopt", rule, ("attention",), grid, k, threshold=threshold, cell=cell)


@each_size
@pytest.mark.parametrize("power", [1.0, 2.0, 0.0])
@pytest.mark.parametrize("fields", [("frame_weights",), ("frame_weights", "saliency")], ids=str)
def test_quota(grid, k, power, fields):
    n = grid[0] * grid[1]

    def rule(x, margin):
        return reference.quota(x["frame_weights"], x.get("saliency"), n, k, margin, power)

    compare("quota", rule, fields, grid, k, power=power)


@each_size
def test_fastv(grid, k):
    compare(
        "fastv",
        lambda x, margin: reference.fastv(x["probe"], k, margin),
        ("probe",),
        grid,
        k,
        probe=0,
    )


@each_size
@pytest.mark.parametrize("t", [5, 2, 1])
def test_sparsevlm(grid, k, t):
    def rule(x, margin):
        return reference.sparsevlm(x["features"], x["text"][:t], x["probe"], k, margin)

    if t == 5:
        compare("sparsevlm", rule, ("text", "probe"), grid, k, probe=slice(5))
        return
    given = {key: torch.from_numpy(value) for key, value in inputs(grid, 0).items()}
    few = {"text": given["text"][:t], "probe": given["probe"][:, :t]}
    exact = {key: value.double().numpy() for key, value in {**given, **few}.items()}
    got = prune(given["features"], **few, budget=k, method="sparsevlm")
    assert got.indices.tolist() == rule(exact, [])


@each_size
@pytest.mark.parametrize(
    "options", [{}, {"image_pivots": 1}, {"image_pivots": 3, "text_pivots": 9}], ids=str
)
@pytest.mark.parametrize("fields", [("probe",), ("probe", "text")], ids=str)
def test_dart(grid, k, options, fields):

    def rule(x, margin):
        return reference.dart(x["features"], x["probe"], x.get("text"), k, margin, **options)

    compare("dart", rule, fields, grid, k, probe=slice(6), **options)


@each_size
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("seeds", [0.01, 0.3])
@pytest.mark.parametrize(
    ("positions", "first", "base", "dim"), [("raster", 35, 1e4, 128), ("grid", 4, 1e6, 32)]
)
def test_ivc(grid, k, share, seeds, positions, first, base, dim):
    rule = lambda x, margin: reference.ivc(  # noqa: E731
        x["probe"], grid, k, margin, seeds, share, positions, first, base, dim
    )
    options = {"seed_share": seeds, "position_share": share, "positions": positions}
    options |= {"first_position": first, "rope_base": base, "head_dim": dim}
    compare("ivc", rule, ("probe",), grid, k, probe=slice(None), **options)
