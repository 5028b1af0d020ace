"""The methods of test_rivals_b.py by hand: published counts, ties, wrong inputs, and nothing read
from the device.
"""

from __future__ import annotations

import pytest
import torch

from fsr_vllm.methods import get_method, prune

from .default_methods import each_field, make_tokens

NAMES = [
    "vispruner",
    "visionzip",
    "visiondrop",
    "prumerge",
    "vflowopt",
    "quota",
    "fastv",
    "sparsevlm",
    "dart",
    "ivc",
]


def test_published_counts():
    """What the spec reports for N = 576: shares of VisionZip and VisionDrop, and picks of DART per
    pivot.
    """
    for name, k, contextual in [
        ("visionzip", 192, 30),
        ("visionzip", 128, 20),
        ("visionzip", 64, 10),
        ("visiondrop", 48, 6),
    ]:
        got = get_method(name).prune(make_tokens(get_method(name), 576), k)
        assert (
            got.num_merged == 576 - (k - contextual - 1) - contextual - 1
        ).all()  # [CLS] is one of the others
        for image, row in zip(got.merged_into, got.tokens, strict=True):
            assert len(set(image.tolist()) - {-1}) == contextual and len(row) == k
    tokens = make_tokens(get_method("dart"), 576)
    for k, plain in ((192, 188), (128, 124), (64, 60)):
        plainly, full = (get_method("dart").prune(tokens, budget).indices for budget in (plain, k))
        assert all(set(a) <= set(b) for a, b in zip(plainly.tolist(), full.tolist(), strict=True))


def test_ties_go_to_the_lower_index():
    """Constant signals: who is kept follows from the order of tokens alone."""
    x, one = torch.ones(9, 4), torch.ones(9)
    first = {
        "fastv": {"probe": one},
        "dart": {"probe": x},
        "sparsevlm": {"probe": x, "text": torch.ones(4, 4)},
        "ivc": {"probe": torch.ones(9, 11), "position_share": 0.0},
        "prumerge": {"last_query": torch.ones(4), "last_key": x, "variant": "base"},
    }
    for name, signals in first.items():
        k = 4
        assert prune(x, budget=k, method=name, **signals).indices.tolist() == [0, 1, 2, 3], name
    spread = {
        "last_query": torch.ones(4),
        "last_key": x,
    }  # no outliers: every third place, and the rest at the first
    assert prune(x, budget=4, method="prumerge", **spread).indices.tolist() == [0, 1, 3, 6]
    # Of 2 .. 8, wanted two: 2, 4, 6, 8 go at once, compared with 3, 5, 7; then 7, compared with 5.
    assert prune(x, saliency=one, budget=4, method="vispruner").indices.tolist() == [0, 1, 3, 5]
    assert prune(x, saliency=one, budget=4, method="vispruner", step=1).indices.tolist() == [
        0,
        1,
        2,
        4,
    ]
    zipped = prune(x, saliency=one, keys=x, budget=4, method="visionzip", contextual_share=0.5)
    assert zipped.indices.tolist() == [0, 1, 2, 5] and zipped.merged_into.tolist() == [-1] * 3 + [
        2,
        2,
        -1,
        2,
        2,
        2,
    ]
    assert torch.equal(zipped.tokens[2], 2 * x[2]) and torch.equal(
        zipped.tokens[3], x[5]
    )  # a sum; one without members
    cells = prune(x, attention=torch.ones(9, 9) / 9, budget=5, method="vflowopt", cell=2.0)
    # Cells 0 1 3 4, 2 5, 6 7 and 8: with token 0 kept, the others of the four make five rows.
    assert cells.indices.tolist() == [0, 1, 2, 6, 8] and cells.merged_into.tolist() == [
        -1,
        -1,
        -1,
        1,
        1,
        2,
        -1,
        6,
        -1,
    ]


def test_quota_of_frames():
    frames = lambda weights, k, n=12: prune(  # noqa: E731
        torch.ones(n, 2), frame_weights=torch.tensor(weights), budget=k, method="quota"
    ).indices.tolist()
    assert frames([1.0, 1.0, 1.0], 6) == [1, 3, 5, 7, 9, 11]  # two of each, evenly spaced
    assert frames([3.0, 0.0, 1.0], 4) == [0, 2, 3, 10]
    assert frames([0.0, 5.0, -2.0], 6) == [
        2,
        4,
        5,
        6,
        7,
        10,
    ]  # a full frame hands on what it cannot hold
    assert frames([0.0, 0.0, 0.0], 4) == [1, 3, 6, 10]
    assert frames([1.0] * 5, 2, n=3) == [0, 1]  # more frames than tokens


def test_wrong_probes_are_named():
    x = torch.ones(6, 4)
    wrong = {"fastv": (6, 1), "dart": (6,), "sparsevlm": (6, 2), "ivc": (6, 6)}
    for name, shape in wrong.items():
        text = {"text": torch.ones(3, 4)} if name in ("sparsevlm", "dart") else {}
        with pytest.raises(ValueError, match=f"probe must hold .* for {name}; got "):
            prune(x, probe=torch.ones(shape), budget=2, method=name, **text)
    for text in (torch.ones(3, 5), torch.ones(0, 4)):
        with pytest.raises(
            ValueError, match="text must hold one or more rows of the width of features, 4"
        ):
            prune(x, probe=torch.ones(6, len(text)), text=text, budget=2, method="sparsevlm")
    with pytest.raises(ValueError, match="text must have the width of features, 4; got 5"):
        prune(x, probe=x, text=torch.ones(3, 5), budget=2, method="dart")
    assert len(prune(x, probe=x, text=torch.ones(0, 4), budget=5, method="dart").indices) == 5


def test_prumerge_plus_makes_the_published_centres():
    """Every outlier, and the authors' stride over the whole raster: exactly their set where K is
    their number.
    """
    score = torch.zeros(48)
    outliers = [
        5,
        12,
        30,
        47,
    ]  # 48 / 4 = 12, a third of it: every fourth place, of which 12 is one already
    score[outliers] = torch.tensor([4.0, 6.0, 5.0, 3.0])
    signals = {
        "last_query": torch.ones(1),
        "last_key": score[:, None],
        "method": "prumerge",
        "neighbours": 0,
    }
    centres = sorted({*outliers, *range(0, 47, 4)})
    got = prune(torch.eye(48), budget=len(centres) + 1, **signals)
    assert got.indices.tolist() == sorted(
        [*centres, 1]
    )  # the rest stands at the first of equals that is no centre
    few = prune(torch.eye(48), budget=4, **signals)
    assert few.indices.tolist() == [
        5,
        12,
        30,
        47,
    ]  # three outliers; the rest at the fourth, of highest attention
    base = prune(torch.eye(48), budget=4, variant="base", **signals)
    assert torch.equal(base.tokens, few.tokens)
    # Fewer than the authors would take: 4 outliers and three, every 23rd place; more: a closer
    # raster.
    assert prune(torch.eye(48), budget=8, **signals).indices.tolist() == [
        0,
        1,
        5,
        12,
        23,
        30,
        46,
        47,
    ]
    assert prune(torch.eye(48), budget=27, **signals).indices.tolist() == sorted(
        {*outliers, *range(0, 47, 2), 1}
    )


def test_ivc_rounds_and_always_keeps_its_seeds():
    """6 seeds at N = 576, where cutting off would make 5; 14 places by each criterion at N = 135, K
    = 68, share 0.2.
    """
    n = 576
    text = torch.zeros(n, 1)
    text[100:106, 0] = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    probe = torch.cat([torch.zeros(n, n), text], 1)
    probe[200:, 100:105] = 9.0  # by five seeds others are better, also than the sixth
    got = prune(
        torch.ones(n, 2),
        probe=probe,
        budget=12,
        method="ivc",
        position_share=0.5,
        first_position=100_000,
    )
    assert {*range(100, 106)} <= {*got.indices.tolist()}
    flat = torch.zeros(135, 136)
    flat[:, 135] = torch.arange(135.0, 0, -1)  # the score prefers low places
    kept = prune(
        torch.ones(135, 2), probe=flat, budget=68, method="ivc", position_share=0.2
    ).indices.tolist()
    frequency = 10000.0 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    angle = (35 + torch.arange(135, dtype=torch.float64))[:, None] * frequency
    by = [
        turn(angle).sum(1).argsort(descending=True)[:14].tolist() for turn in (torch.cos, torch.sin)
    ]
    wanted = {0, *by[0], *by[1]}
    wanted |= {*[place for place in range(135) if place not in wanted][: 68 - len(wanted)]}
    assert kept == sorted(wanted)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name):
    """Tensors without values: reading one, or making one on another device, would fail."""
    method = get_method(name)
    tokens = each_field(make_tokens(method, 30), lambda value: value.to("meta"))
    for k in (1, 9, 29):
        assert method.prune(tokens, k, validate=False).tokens.shape == (2, k, 6)
