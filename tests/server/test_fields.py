"""Where a request says its fields: places that must agree, a header, a name; no server."""

import json

import pytest

from fsr_vllm.params import FieldError, ServerSettings
from fsr_vllm.server import fields

from .hooked import asked


def test_a_field_may_stand_in_several_places_if_they_agree():
    for said in (
        {"fsr_budget": 64, "mm_processor_kwargs": {"fsr_budget": 64}, "xargs": {"fsr_budget": 64}},
        {"fsr_budget": 64.0, "xargs": {"fsr_budget": 64}},
        {"mm_processor_kwargs": {"fsr_budget": 64, "fsr_method": None}},
    ):
        assert asked({}, **said) == {"fsr_budget": 64}
    options = {"rho": 0.5}
    said = {"fsr_options": dict(options), "mm_processor_kwargs": {"fsr_options": dict(options)}}
    assert asked({}, **said) == {"fsr_options": options}


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("fsr_budget", 64, 65),
        ("fsr_budget", 1, True),
        ("fsr_budget", 1, 1.0),
        ("fsr_budget", [64], 64),
        ("fsr_budget", [1, 64], [True, 64]),
        ("fsr_question", "1", 1),
        ("fsr_question", ["q"], "q"),
        ("fsr_question", ["p", "q"], ["p"]),
        ("fsr_options", {"rho": 1}, {"rho": True}),
        ("fsr_options", {"rho": "1"}, {"rho": 1}),
        ("fsr_options", {"rho": 1}, {"kappa": 1}),
        ("fsr_options", {"rho": [1]}, {"rho": [True]}),
        ("fsr_method", "fsr", "random"),
    ],
)
def test_values_that_differ_are_refused_types_and_all(name, one, other):
    for left, right in ((one, other), (other, one)):
        for places in (
            ({name: left}, {name: right}),
            ({name: left}, {}, {name: right}),
            ({}, {name: left}, {name: right}),
        ):
            with pytest.raises(FieldError, match=f"{name} stands in two places") as error:
                fields.merged(*places)
            assert error.value.field == name


def test_values_too_deep_or_too_long_to_be_a_fields_are_not_gone_through():
    deep, also = json.loads("[" * 900 + "]" * 900), json.loads("[" * 900 + "]" * 900)
    for name in ("fsr_budget", "fsr_options"):
        with pytest.raises(FieldError, match="stands in two places"):
            fields.merged({name: deep}, {name: also})
    long, other = [0.5] * 20_000, [0.25] * 20_000
    assert fields.merged({"fsr_budget": long}, {"fsr_budget": other})["fsr_budget"] is long


def test_the_first_place_is_what_counts():
    assert fields.merged({"a": 1}, {"b": 2}, {"a": 1, "c": 3}) == {"a": 1, "b": 2, "c": 3}
    first = fields.merged({"fsr_budget": 64}, {"fsr_budget": 64.0})["fsr_budget"]
    assert (first, type(first)) == (64, int)
    assert fields.merged({"fsr_options": {"rho": 1}}, {"fsr_options": {"rho": 1.0}})
    assert fields.merged() == {}


def test_each_of_vllms_carriers_is_read():
    top, kwargs, xargs = {"fsr_budget": 8}, {"fsr_method": "fsr", "theirs": 1}, {"fsr_question": ""}
    found = fields.written(top, kwargs, xargs)
    assert found == {"fsr_budget": 8, "fsr_method": "fsr", "fsr_question": ""}
    assert fields.written(None, ["fsr_budget"], "fsr_budget") == {}
    assert fields.written({"fsr_budget": None, "other": 1}, None, {"fsr_method": None}) == {}


def test_options_are_text_in_extra_arguments():
    assert asked({}, xargs={"fsr_options": '{"rho": 0.5}'}) == {"fsr_options": {"rho": 0.5}}
    assert asked({}, xargs={"fsr_options": {"rho": 0.5}}) == {"fsr_options": {"rho": 0.5}}
    for text in ("{", "[" * 100_000, "[1]", "5"):
        with pytest.raises(ValueError, match="fsr_options") as error:
            asked({}, xargs={"fsr_options": text})
        assert error.value.parameter == "fsr_options"
    with pytest.raises(ValueError, match="fsr_options must be an object"):
        asked({}, fsr_options='{"rho": 0.5}')  # text there alone


def test_a_header_and_a_body_must_agree():
    assert asked({}, header="64") == asked({}, header="64", fsr_budget=64) == {"fsr_budget": 64}
    assert asked({}, header="64", fsr_budget=64.0) == {"fsr_budget": 64}
    assert asked({}, header="64", fsr_method="fsr") == {"fsr_budget": 64, "fsr_method": "fsr"}
    for other in (65, 0.64, "off", [64], "64", True):
        with pytest.raises(ValueError, match="fsr_budget .* in the body differs from 64") as error:
            asked({}, header="64", fsr_budget=other)
        assert error.value.parameter == "fsr_budget"
    with pytest.raises(ValueError, match="not active") as error:
        asked(None, header="64")
    assert error.value.parameter == "x-fsr-budget"


def test_a_budget_is_judged_under_the_name_it_came_in_by():
    settings = {"min_budget": 16, "max_budget": 64, "tokens_per_image": 576}
    for header, said, name in (
        ("65", {}, "x-fsr-budget"),
        ("65", {"fsr_budget": 65}, "fsr_budget"),
        ("0.9", {}, "x-fsr-budget"),
        ("[16, 15]", {}, "x-fsr-budget"),
        ("off", {}, "x-fsr-budget"),
        ("1.0", {"fsr_budget": 1}, "x-fsr-budget"),
        (None, {"fsr_budget": 65}, "fsr_budget"),
    ):
        with pytest.raises(ValueError, match=f"^{name} ") as error:
            asked(settings, header=header, **said)
        assert error.value.parameter == name
    for header in ("16", "64", "[16, 64]", "0.1"):
        assert asked(settings, header=header)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("64", 64),
        ("64, 64", 64),
        ("64,64.0, 64", 64),
        ("[8, 0.5]", [8, 0.5]),
        ('[8, "off"], [8.0, "off"]', [8, "off"]),
        ("off, OFF", "off"),
    ],
)
def test_header_lines(text, budget):
    assert fields.header_budget(text) == budget


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("64, 65", "more than once"),
        ("64, off", "more than once"),
        ("[64], 64", "more than once"),
        ("1, true", "must be"),
        ("64,", "must be"),
        (",64", "must be"),
        ("", "must be"),
        ("[64", "must be"),
        ("]64[, 64", "must be"),
    ],
)
def test_header_lines_that_are_no_budget(text, words):
    with pytest.raises(FieldError, match=words) as error:
        fields.header_budget(text)
    assert error.value.field == "x-fsr-budget"


def test_the_header_joins_the_body_without_changing_it():
    body = {"fsr_method": "fsr"}
    found = fields.with_header(body, "64", ServerSettings())
    assert found == {"fsr_method": "fsr", "fsr_budget": 64}
    assert body == {"fsr_method": "fsr"}
