"""What may be asked, and what it comes to: budgets, bounds, methods, identities."""

import json
import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsr_vllm.params import (
    MAX_QUESTION,
    FieldError,
    ImagePlan,
    RequestFields,
    ServerSettings,
    parse_budget_text,
    resolve,
    resolve_budget,
    same_budget,
)
from fsr_vllm.params.budget import parse_budget, parse_budgets

ALL = {"saliency", "relevance", "metric", "keys", "cls_row", "attention"}


def plans(fields, totals=(576,), signals=ALL, **settings):
    server = ServerSettings.parse(settings)
    return resolve(RequestFields.parse(fields, server), server, totals, signals)


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        1.0,
        1.5,
        0.0,
        -2.0,
        32.5,
        True,
        False,
        "many",
        "128",
        10**12,
        1_000_001,
        1e7,
        1e300,
        {},
        b"off",
    ],
)
def test_no_budget(value):
    with pytest.raises(FieldError, match="fsr_budget must be") as error:
        parse_budgets(value)
    assert error.value.field == "fsr_budget"


@pytest.mark.parametrize(
    ("value", "budget"), [(32.0, 32), (2.0, 2), (numpy.float64(576.0), 576), (1e6, 1_000_000)]
)
def test_a_whole_number_written_as_a_float_is_that_integer(value, budget):
    assert parse_budget(value) == budget
    assert type(parse_budget(value)) is int
    assert parse_budgets([value, 0.5]) == [budget, 0.5]


def test_one_point_zero_says_why_it_is_no_budget():
    with pytest.raises(FieldError, match="one token or the whole image"):
        parse_budget(1.0)


def test_equal_budgets():
    assert same_budget(64, 64.0)
    assert same_budget([8.0, "off"], [8, "off"])
    for left, right in (
        (1, True),
        (1, 1.0),
        (64, 65),
        ([64], 64),
        (0.5, "0.5"),
        ([8], [8, 8]),
        ([[8]], [8]),
    ):
        assert not same_budget(left, right)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, None, [], [None], [64, 1.0], [[64]]]
)
def test_no_budgets(value):
    with pytest.raises(FieldError):
        parse_budgets(value)


@given(
    st.one_of(
        st.integers(), st.floats(), st.text(), st.booleans(), st.none(), st.lists(st.integers())
    )
)
def test_a_budget_is_valid_or_refused_by_name(value):
    named, budgets = "fsr_budget", []
    try:
        budgets = parse_budgets(value)
    except FieldError as error:
        named = error.field
    assert named == "fsr_budget"
    for budget in budgets if isinstance(budgets, list) else [budgets]:
        assert 1 <= resolve_budget(budget, 576) <= 576


@given(st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(1, 5000))
def test_shares(share, total):
    assert resolve_budget(share, total) == max(1, math.floor(share * total + 0.5)) <= total


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("128", 128),
        ("32.0", 32),
        ("1e3", 1000),
        (" 0.5 ", 0.5),
        ("off", "off"),
        ("OFF", "off"),
        ('"off"', "off"),
        ('[8, "off"]', [8, "off"]),
    ],
)
def test_budget_as_text(text, value):
    assert parse_budget_text(text, "x-fsr-budget") == value


@pytest.mark.parametrize(
    "text", ["", "many", "1.0", "NaN", "true", "null", "64,65", "{}", "[]", "1e7"]
)
def test_no_budget_as_text(text):
    with pytest.raises(FieldError) as error:
        parse_budget_text(text, "x-fsr-budget")
    assert error.value.field == "x-fsr-budget"


def test_one_plan_per_image():
    kept = [plan.keep for plan in plans({"fsr_budget": [64, "off", 0.25, 9999]}, totals=(576,) * 4)]
    assert kept == [64, 576, 144, 576]
    assert [plan.pruned for plan in plans({}, totals=(576, 10))] == [False, False]
    for wrong in ([64], [64, 64, 64]):
        with pytest.raises(FieldError, match="2 image"):
            plans({"fsr_budget": wrong}, totals=(576, 576))


def test_all_that_keeps_everything_is_one_plan():
    same = {
        plans({"fsr_budget": b, "fsr_method": m}, max_budget=None)[0]
        for b in ("off", 576, 1000)
        for m in ("fsr", "random")
    }
    assert same == {ImagePlan(576, 576)}


def test_resolved_values_not_spellings_make_the_plan():
    spelled = [
        {"fsr_budget": 144},
        {"fsr_budget": 0.25},
        {"fsr_budget": 0.2501},
        {"fsr_budget": 144, "fsr_options": {"rho": 0.9}},
    ]
    spelled += [
        {"fsr_budget": 144, "fsr_options": {"beta": 1}},
        {"fsr_budget": 144, "fsr_options": None},
    ]
    assert len({plans({**fields, "fsr_question": " q "})[0] for fields in spelled}) == 1
    different = [
        {"fsr_budget": 143},
        {"fsr_question": "p"},
        {"fsr_method": "random"},
        {"fsr_options": {"rho": 0.8}},
    ]
    base = {"fsr_budget": 144, "fsr_question": "q"}
    assert len({plans({**base, **fields})[0] for fields in [{}, *different]}) == 5


def test_the_question_counts_only_where_it_can_matter():
    for fields, signals in (({"fsr_method": "fastervlm"}, ALL), ({}, ALL - {"relevance"})):
        one, two = (
            plans({"fsr_budget": 64, "fsr_question": q, **fields}, signals=signals)[0]
            for q in ("p", "q")
        )
        assert one == two
    text = {"fsr_budget": 64, "fsr_question": "p", "fsr_method": "zspaprune"}
    assert (
        plans(text, signals={"text"})[0].question == "p"
    )  # read by the language model, whatever the text encoder
    asked = plans({"fsr_budget": 64, "fsr_question": ["p", ""]}, totals=(576, 576))
    assert [plan.question for plan in asked] == ["p", ""]


def test_a_question_has_a_longest_length():
    plans({"fsr_budget": 64, "fsr_question": "x" * MAX_QUESTION})
    with pytest.raises(FieldError, match="characters") as error:
        plans({"fsr_budget": 64, "fsr_question": ["", "x" * (MAX_QUESTION + 1)]}, totals=(576, 576))
    assert error.value.field == "fsr_question"


def test_a_method_without_its_signal_is_refused():
    with pytest.raises(FieldError, match="relevance") as error:
        plans({"fsr_budget": 64, "fsr_method": "cdpruner"}, signals=ALL - {"relevance"})
    assert error.value.field == "fsr_method"


def test_plans_survive_the_way_to_the_worker():
    (plan,) = plans({"fsr_budget": 64, "fsr_question": "Wer hat die rote Fahne? 旗"})
    assert ImagePlan.decode(plan.encode()) == plan
    assert json.loads(plan.options)["rho"] == 0.9


def test_bounds_and_default():
    assert plans({}, max_budget=128)[0].keep == 128
    assert plans({}, max_budget=128, budget=32)[0].keep == 32
    assert plans({"fsr_budget": 0.5}, min_budget=64)[0].keep == 288
    for asked in ("off", 129, 0.5, 15, 0.01, 1000):
        with pytest.raises(FieldError) as error:
            plans({"fsr_budget": asked}, min_budget=16, max_budget=128)
        assert error.value.field == "fsr_budget"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (0.9, "fsr_budget 0.9 of 144 = 130, above this server's maximum 64 (allowed: 16 to 64)"),
        (0.05, "fsr_budget 0.05 of 144 = 7, below this server's minimum 16 (allowed: 16 to 64)"),
        (
            "off",
            'fsr_budget "off" of 144 = 144, above this server\'s maximum 64 (allowed: 16 to 64)',
        ),
        (200, "fsr_budget 200, above this server's maximum 64 (allowed: 16 to 64)"),
        (15, "fsr_budget 15, below this server's minimum 16 (allowed: 16 to 64)"),
    ],
)
def test_a_budget_out_of_bounds_states_both_numbers(asked, words):
    settings = ServerSettings.parse({"min_budget": 16, "max_budget": 64}).model_copy(
        update={"tokens_per_image": 144}
    )
    with pytest.raises(FieldError) as error:
        resolve(RequestFields.parse({"fsr_budget": asked}, settings), settings, [144], ALL)
    assert str(error.value) == words


def test_off_is_allowed_where_no_image_has_more_than_the_maximum():
    settings = ServerSettings.parse({"max_budget": 600}).model_copy(
        update={"tokens_per_image": 576}
    )
    (plan,) = resolve(RequestFields.parse({"fsr_budget": "off"}, settings), settings, [576], ALL)
    assert plan == ImagePlan(576, 576)


def test_names_and_values_of_others_are_cut():
    long = "fsr_" + "x" * 10_000
    for values in (
        {long: 1},
        {"fsr_method": long},
        {"fsr_budget": long},
        {"fsr_options": {long: 1}},
    ):
        with pytest.raises(FieldError) as error:
            RequestFields.parse(values, ServerSettings())
        assert len(error.value.field) <= 80
        assert len(str(error.value)) < 700
    for values in (
        {long: 1},
        {"method": long},
        {"detail_budgets": {long: 1}},
        {"max_budget": long},
    ):
        with pytest.raises(FieldError) as error:
            ServerSettings.parse(values)
        assert len(error.value.field) <= 80
        assert len(str(error.value)) < 700


def test_near_words_are_suggested():
    for values, meant in (
        ({"fsr_bugdet": 1}, "fsr_budget"),
        ({"fsr_method": "divprun"}, "divprune"),
    ):
        with pytest.raises(FieldError, match=f"did you mean {meant}"):
            RequestFields.parse(values, ServerSettings())
    with pytest.raises(FieldError, match="did you mean max_budget"):
        ServerSettings.parse({"max_bugdet": 1})
