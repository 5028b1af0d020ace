"""A request's fields: what a wrong one is told, their schema, and how they travel to planning."""

import json

import pytest

from fsr_vllm.params import (
    REQUEST_FIELDS,
    Derived,
    FieldError,
    FsrRequest,
    RequestFields,
    ServerSettings,
    own_fields,
    request_of,
    with_request,
    without_fields,
)


def test_a_renamed_method_is_told_its_new_name():
    with pytest.raises(FieldError, match="got 'none'; it is now called truncate") as error:
        RequestFields.parse({"fsr_method": "none"}, ServerSettings())
    assert error.value.field == "fsr_method"
    with pytest.raises(FieldError, match="it is now called truncate"):
        ServerSettings.parse({"method": "none"})
    assert RequestFields.parse({"fsr_method": "truncate"}, ServerSettings())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fsr_method": 3}, "fsr_method must be the name of a method; got 3"),
        ({"fsr_options": [1]}, "fsr_options must be an object of the method's options; got [1]"),
        ({"fsr_question": 5}, "fsr_question must be text, or a list with one text per image; got"),
        ({"fsr_question": ["a", 5]}, "fsr_question must be text, or a list with one text per"),
        ({"fsr_question": "half \ud800"}, "fsr_question must be valid Unicode"),
        ({"fsr_budget": [64] * 10_001}, "fsr_budget has 10001 entries"),
        ({"fsr_x": 1}, "unknown field 'fsr_x'; fsr fields are fsr_budget, fsr_method, fsr_quest"),
    ],
    ids=str,
)
def test_what_a_wrong_field_is_told(fields, words):
    with pytest.raises(FieldError) as error:
        RequestFields.parse(fields, ServerSettings())
    assert words in str(error.value)
    assert error.value.field == next(iter(fields))


def test_the_schema_says_what_a_request_may_hold():
    shown = RequestFields.model_json_schema()
    assert list(shown["properties"]) == list(REQUEST_FIELDS)
    assert not shown["additionalProperties"]
    kinds = json.dumps(shown["properties"]["fsr_budget"])
    for part in ('"maximum": 1000000', '"exclusiveMaximum": 1', '"const": "off"', '"array"'):
        assert part in kinds
    assert all(shown["properties"][name]["description"] for name in REQUEST_FIELDS)


def test_a_request_travels_without_its_fields_as_written():
    request = FsrRequest(RequestFields(fsr_budget=64), Derived(("q",)))
    given = {"theirs": 1, "fsr_budget": 64, "fsrMethod": None, "fsr_request": {"fields": {}}}
    sent = with_request(given, request)
    assert sent == {"theirs": 1, "fsr_request": request}
    assert request_of(sent) is request
    assert request_of(given) is request_of(None) is None
    assert own_fields(given) == {"fsr_budget": 64, "fsr_request": {"fields": {}}}
    assert own_fields(["fsr_budget"]) == {}
    assert without_fields(sent) == {"theirs": 1}
    assert without_fields(None) == {}


def test_what_is_derived_speaks_of_all_images_or_of_none():
    derived = Derived(("p", "q"), (None, 64))
    assert derived.of(2) is derived
    assert derived.of(1) == derived.of(3) == Derived()
    assert Derived(("p",)).of(1) == Derived(("p",))
    assert Derived(("p",), (1, 2)).of(2) == Derived()
