"""The methods of test_rivals_a.py by hand: ties, crops, rounding, edges, and what signals say."""

from __future__ import annotations

import pytest
import torch

from fsr_vllm.methods import prune


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
