"""Model names with a budget behind them, without a server."""

import pytest

from fsr_vllm.server import ignored, model_alias

from .hooked import after, asked, configured, parsed

ALIAS = {"model_alias": True}
LOW = {"type": "image_url", "image_url": {"url": "u", "detail": "low"}}


@pytest.mark.parametrize(("suffix", "budget"), [("128", 128), ("0.25", 0.25), ("off", "off")])
def test_a_name_with_a_budget(suffix, budget):
    name = f"a/b@fsr{suffix}"
    request = parsed(model=name)
    assert model_alias.split_if_served(configured(ALIAS), request) == suffix
    assert request.model == "a/b"
    assert asked(ALIAS, model=name) == {"fsr_budget": budget}
    # The request itself comes first, and so does its header; details come after.
    assert asked(ALIAS, model=name, fsr_budget=7) == {"fsr_budget": 7}
    assert asked(ALIAS, model=name, header="8") == {"fsr_budget": 8}
    assert asked(ALIAS, model=name, fsr_method="fsr")["fsr_budget"] == budget
    settings = {**ALIAS, "detail_budgets": {"low": 16}}
    messages = [{"role": "user", "content": [LOW]}]
    found = after(settings, model=name, messages=messages)["fsr_request"]
    assert (found.fields.fsr_budget, found.derived.budgets) == (budget, ())
    assert asked(ALIAS, model="a/b") == {}  # the next request of the same task


def test_names_that_are_none_of_ours():
    for name in ("a/b", "a@b", "@fsr64", None, "", "a@FSR64"):
        request = parsed(model=name)
        assert model_alias.split(request) is None
        assert request.model == name
    for settings in ({}, None):  # not enabled: vLLM's own 404
        request = parsed(model="a/b@fsr64")
        assert model_alias.split_if_served(configured(settings), request) is None
        assert request.model == "a/b@fsr64"


def test_the_last_mark_is_the_one_that_counts():
    request = parsed(model="a@fsr1@fsr64")
    assert model_alias.split(request) == "64"
    assert request.model == "a@fsr1"


@pytest.mark.parametrize(
    "suffix", ["0", "-1", "1.0", "many", "", "true", "[1,2]", "1000001", "[" * 5000]
)
def test_wrong_budgets_behind_a_name(suffix):
    with pytest.raises(ValueError, match="^model") as error:
        asked(ALIAS, model=f"a/b@fsr{suffix}")
    assert error.value.parameter == "model"
    assert len(str(error.value)) < 400


def test_a_name_with_a_budget_keeps_to_the_servers_range_and_abilities():
    with pytest.raises(ValueError, match="64"):
        asked({**ALIAS, "max_budget": 64}, model="m@fsr65")
    with pytest.raises(ValueError, match="0.9 of 576 = 518, above") as error:
        asked({**ALIAS, "max_budget": 64, "tokens_per_image": 576}, model="m@fsr0.9")
    assert error.value.parameter == "model"
    with pytest.raises(ValueError, match=r"asks for a budget \(@fsr64\), but no tower"):
        after(ALIAS, "no tower", model="m@fsr64")


def test_a_server_that_ignores_takes_the_suffix_off_and_drops_fields():
    request = parsed(model="m@fsrmany", mm_processor_kwargs={"fsr_x": 1, "fsrBudget": 2})
    request.vllm_xargs = {"fsr_budget": 0, "theirs": 1}
    ignored.drop_suffix(configured(), request)
    ignored.drop_fields(None, request)
    assert (request.model, request.mm_processor_kwargs) == ("m", None)
    assert request.vllm_xargs == {"theirs": 1}
    theirs = {"theirs": 1}
    request = parsed(model="a@b", mm_processor_kwargs=theirs)
    ignored.drop_suffix(configured(), request)
    ignored.drop_fields(None, request)
    assert request.model == "a@b"
    assert request.mm_processor_kwargs is theirs
