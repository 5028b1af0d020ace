"""What a request may ask of a method: nothing that would cost all others their turn."""

from __future__ import annotations

import pytest
import torch

from fsr_vllm.engine.processor import TAP_SIGNALS
from fsr_vllm.methods import list_methods, prune
from fsr_vllm.params import FieldError, RequestFields, ServerSettings, resolve


def plan(total, keep=64, **options):
    server = ServerSettings()
    fields = {"fsr_budget": keep, "fsr_method": "vispruner", "fsr_options": options}
    return resolve(RequestFields.parse(fields, server), server, [total], TAP_SIGNALS)[0]


@pytest.mark.parametrize("total, least", [(576, 8), (577, 9), (2880, 40), (9000, 125)])
def test_the_step_of_vispruner_is_bounded_by_the_image(total, least):
    for step in (1, least - 1):
        with pytest.raises(
            FieldError, match=f"step must be at least {least} in a request .*; got {step}"
        ) as error:
            plan(total, step=step)
        assert error.value.field == "fsr_options" and f"{total:,} visual tokens" in str(error.value)
    assert f'"step":{least}' in plan(total, step=least).options
    assert plan(total).pruned and plan(total, step=0).pruned
    assert not plan(total, keep=total, step=1).pruned  # nothing is selected


def test_each_image_of_a_request_has_its_own_bound():
    server = ServerSettings()
    fields = RequestFields.parse(
        {"fsr_budget": 64, "fsr_method": "vispruner", "fsr_options": {"step": 8}}, server
    )
    assert len(resolve(fields, server, [576, 144], TAP_SIGNALS)) == 2
    with pytest.raises(FieldError, match="an image of 1,152 visual tokens"):
        resolve(fields, server, [576, 1152], TAP_SIGNALS)


@pytest.mark.parametrize("n, step", [(144, 8), (576, 8), (720, 10)])
def test_without_a_step_there_are_at_most_as_many_rounds_as_published(n, step):
    g = torch.Generator().manual_seed(0)
    given = {
        "saliency": torch.rand(n, generator=g),
        "metric": torch.randn(n, 8, generator=g),
        "method": "vispruner",
    }
    automatic = prune(torch.ones(n, 2), budget=40, **given).indices
    assert torch.equal(automatic, prune(torch.ones(n, 2), budget=40, step=step, **given).indices)
    assert not torch.equal(
        automatic, prune(torch.ones(n, 2), budget=40, step=1, **given).indices
    )  # offline it may be


def test_servable_is_what_some_server_can_form():
    formed = {*TAP_SIGNALS, "relevance", "prototypes"}
    assert {name: info.servable for name, info in list_methods().items()} == {
        name: set(info.needs) <= formed for name, info in list_methods().items()
    }


def test_the_served_preset_is_what_no_preset_means():
    from fsr_vllm.params import build_method

    assert (
        build_method("fsr", {"preset": "served"})
        == build_method("fsr", None)
        != build_method("fsr", {"preset": "paper"})
    )
    with pytest.raises(ValueError, match='"paper", "served" or absent'):
        build_method("fsr", {"preset": "best"})
