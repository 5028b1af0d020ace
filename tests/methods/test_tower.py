"""From a tower's hidden states to the tokens kept: the real hook and each method against references
of both together.

A method's inputs are part of it. The references start from what transformers' CLIP reports with
eager attention; the code under test starts from queries and keys, as `AttentionHook` sees them in
the server.
"""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from fsr_vllm.engine.attention_hook import (
    SHALLOW,
    AttentionHook,
    AttentionLayout,
    shallow_key,
    shallow_keys,
    tapped,
)
from fsr_vllm.methods import VisualTokens, get_method, list_methods

from . import reference, reference_tower
from .reference_tower import Tower

HEADS, DIM, DEPTH, SIDE, WIDTH = 4, 8, 24, 12, 40
N, IMAGES = SIDE * SIDE, 3
MANY = 12  # images in all, for what not every image shows


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """The group of one rank that the hook reduces over, as a worker has it."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


class _Op(nn.Module):
    """An attention op as vLLM's blocks have it: called with query, key and value, heads side by
    side.
    """

    num_heads, scale = HEADS, DIM**-0.5

    def forward(self, query, key, value):
        return value


@pytest.fixture(scope="module")
def encoded():
    """What the reference sees of each image, and the same images' fields as the server forms them."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=HEADS * DIM, intermediate_size=64, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        image_size=14 * SIDE, patch_size=14, attn_implementation="eager",
    )  # fmt: skip
    model = CLIPVisionModel(config).eval()
    for (
        parameter
    ) in model.parameters():  # CLIP's own init is so small that attention would be uniform
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.4)
    projector = nn.Linear(HEADS * DIM, WIDTH, bias=False)
    blocks = next(module for module in model.modules() if hasattr(module, "layers")).layers
    ops = [
        _Op() for _ in range(DEPTH - 1)
    ]  # vLLM does not build the block after the layer that is read
    shallow = frozenset().union(*map(shallow_keys, list_methods().values()))
    hook = AttentionHook(AttentionLayout(ops, DEPTH), shallow)
    with torch.no_grad():
        out = model(
            torch.randn(MANY, 3, 14 * SIDE, 14 * SIDE),
            output_attentions=True,
            output_hidden_states=True,
        )
        wanted = tapped(set(VisualTokens.__dataclass_fields__)) | shallow
        with hook.reading(wanted) as signals:
            for op, block, state in zip(ops, blocks, out.hidden_states, strict=False):
                normed, own = block.layer_norm1(state), block.self_attn
                op(own.q_proj(normed), own.k_proj(normed), own.v_proj(normed))
        signals |= {
            "metric": out.hidden_states[-2][:, 1:],
            "features": projector(out.hidden_states[-2][:, 1:]),
        }
        signals["cls_row"] = projector(out.hidden_states[-2][:, 0])

    def exact(tensor):
        return tensor.detach().double().numpy()

    def made(image, name):
        def of(block):
            own, weights = blocks[block], getattr(blocks[block].self_attn, name)
            state = exact(out.hidden_states[block % DEPTH][image])
            state = (state - state.mean(1, keepdims=True)) / np.sqrt(
                state.var(1, keepdims=True) + config.layer_norm_eps
            )
            state = state * exact(own.layer_norm1.weight) + exact(own.layer_norm1.bias)
            return state @ exact(weights.weight).T + exact(weights.bias)

        return of

    towers = [
        Tower(
            states=[exact(state[image]) for state in out.hidden_states],
            attentions=[exact(weights[image]) for weights in out.attentions],
            queries=made(image, "q_proj"),
            keys=made(image, "k_proj"),
            project=lambda rows: rows @ exact(projector.weight).T,
            side=SIDE,
        )
        for image in range(MANY)
    ]
    return towers, signals


def kept(encoded, name, k, image, **options):
    """What the method makes of one image with the hook's signals, as the adapter names them."""
    method, (_, signals) = get_method(name, **options), encoded
    given = {}
    for field in (*method.required(), *method.uses):
        key = shallow_key(field, method.shallow_layer) if field in SHALLOW else field
        if key in signals:
            given[field] = signals[key][image]
        assert field in given or field in ("grid", "relevance", "group"), field
    return method.prune(VisualTokens(signals["features"][image], grid=(SIDE, SIDE), **given), k)


each_image = pytest.mark.parametrize("image", range(IMAGES))
each_budget = pytest.mark.parametrize("k", [8, 33, 60, 100])


def test_the_tower_is_worth_reading(encoded):
    """Maps that a wrong layer, or [CLS] for all queries, would be found out by."""
    for tower in encoded[0]:
        maps = [
            tower.cls(-2),
            tower.cls(-1),
            tower.cls(5),
            tower.cls(4),
            tower.received(8),
            tower.received(9),
        ]
        maps += [
            tower.received(-2),
            tower.received(-1),
            tower.attentions[8].mean(0)[1:].mean(0)[1:],
        ]
        best = [frozenset(reference_tower.descending(one)[:30]) for one in maps]
        assert len({*best[:-1]}) == len(best) - 1 and all(
            one.std() > 0.1 * one.mean() for one in maps
        )


@each_image
@each_budget
@pytest.mark.parametrize("name", ["fastervlm", "hiprune", "scope", "vispruner"])
def test_selection(encoded, name, k, image):
    assert kept(encoded, name, k, image).indices.tolist() == getattr(reference_tower, name)(
        encoded[0][image], k
    )


@each_image
@pytest.mark.parametrize(
    "k", [8, 20, 33]
)  # above, quotas exceed crops, and the program fills up with zeros
def test_holov(encoded, k, image):
    assert kept(encoded, "holov", k, image).indices.tolist() == reference_tower.holov(
        encoded[0][image], k
    )


@each_image
@each_budget
def test_scope_with_saliency_added(encoded, k, image):
    wanted = reference_tower.scope(encoded[0][image], k, combine="sum")
    assert kept(encoded, "scope", k, image, combine="sum", heads=HEADS).indices.tolist() == wanted


@each_image
@each_budget
def test_saliency_of_fsr(encoded, k, image):
    """Equation (1): the mean over the heads of layer -2's [CLS] attention, in the whole method as
    published.
    """
    tower = encoded[0][image]
    wanted = reference.fsr(
        tower.project(tower.rows).tolist(),
        (tower.cls(-2) / HEADS).tolist(),
        None,
        k,
        rho=0.3,
        max_focus_share=0.5,
    )
    got = kept(encoded, "fsr", k, image, rho=0.3, max_focus_share=0.5)
    assert got.indices.tolist() == wanted.indices and got.is_focus.tolist() == wanted.is_focus
    np.testing.assert_allclose(got.tokens.numpy(), wanted.rows, rtol=1e-3, atol=1e-4)


@each_image
@each_budget
def test_vscan(encoded, k, image):
    places, rows = reference_tower.vscan(encoded[0][image], k)
    got = kept(encoded, "vscan", k, image)
    assert got.indices.tolist() == places
    np.testing.assert_allclose(got.tokens.numpy(), rows, rtol=1e-3, atol=1e-4)


def assert_same_rows(got, wanted):
    """Equal rows, in whatever order: the programs do not write theirs in raster order."""
    distance = np.abs(got[:, None] - wanted[None]).max(-1)
    assert sorted(distance.argmin(1)) == list(range(len(wanted))) and distance.min(1).max() < 1e-3


@each_image
@each_budget
def test_visionzip(encoded, k, image):
    got = kept(encoded, "visionzip", k, image).tokens.double().numpy()
    assert_same_rows(got, reference_tower.visionzip(encoded[0][image], k, HEADS))


def test_prumerge_plus_at_the_programs_own_number(encoded):
    """Queries and keys of the last block the server computes, where the program has those of the
    block after it.
    """
    compared = 0
    for image, tower in enumerate(encoded[0]):
        k, rows = reference_tower.prumerge_plus(tower, DEPTH - 2)
        if k < N:  # with more outliers than a sixth the program keeps everything
            assert_same_rows(kept(encoded, "prumerge", k, image).tokens.double().numpy(), rows)
            compared += 1
    assert compared >= 3


@each_image
@each_budget
def test_vflowopt_importance(encoded, k, image):
    """With cells of one token nothing is merged, and importance alone decides."""
    wanted = reference_tower.vflowopt(encoded[0][image], threshold=1.5)[:k]
    got = kept(encoded, "vflowopt", k, image, threshold=1.5, cell=1.0)
    assert got.indices.tolist() == sorted(wanted)
