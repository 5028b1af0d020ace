"""A budget over all images of a request: how it is written, divided, bounded and carried."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fsr_vllm.params import (
    FieldError,
    RequestFields,
    ServerSettings,
    Total,
    resolve,
    same_budget,
)
from fsr_vllm.server import fields
from fsr_vllm.server.openapi import _inlined

from .server.hooked import after, asked

ALL = {"saliency"}


def parsed(value, **settings):
    return RequestFields.parse({"fsr_budget": value}, ServerSettings.parse(settings))


def kept(value, totals, **settings):
    made = ServerSettings.parse(settings)
    found = resolve(RequestFields.parse({"fsr_budget": value}, made), made, totals, ALL)
    return [plan.keep for plan in found]


@pytest.mark.parametrize(
    "value", [{"total": 640}, {"total": 640.0}, {"total": np.int64(640)}, Total(total=640)]
)
def test_a_total_is_written_as_an_object(value):
    assert parsed(value).fsr_budget == Total(total=640)
    assert parsed(value).budgets() is None


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"total": 0},
        {"total": -1},
        {"total": 0.5},
        {"total": 1.0},
        {"total": True},
        {"total": "64"},
        {"total": None},
        {"total": 1_000_001},
        {"total": [64]},
        {"total": 64, "more": 1},
        {"Total": 64},
    ],
    ids=str,
)
def test_what_is_no_total_says_how_one_is_written(value):
    with pytest.raises(FieldError, match='fsr_budget must be, as an object, {"total": K}') as error:
        parsed(value)
    assert error.value.field == "fsr_budget"


@pytest.mark.parametrize("value", [[{"total": 64}], [8, {"total": 64}], [Total(total=64), "off"]])
def test_lists_and_totals_do_not_mix(value):
    with pytest.raises(FieldError, match="cannot be an entry of a list") as error:
        parsed(value)
    assert error.value.field == "fsr_budget"


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=30),
    st.integers(0, 100_000),
)
@example([2928] * 3 + [1] * 5, 2)
@example([1, 1, 5000], 0)
def test_the_parts_are_exact_and_in_proportion(sizes, more):
    total = len(sizes) + more
    parts = Total(total=total).share(sizes)
    assert sum(parts) == min(total, sum(sizes))
    assert all(1 <= part <= size for part, size in zip(parts, sizes, strict=True))
    if total >= sum(sizes):
        return
    # Whoever has more than the one token that everybody gets has its quota among these, but for
    # what rounding gives or takes.
    shared = [place for place, part in enumerate(parts) if part > 1]
    left = total - sum(1 for part in parts if part == 1)
    weight = sum(sizes[place] for place in shared)
    for place in shared:
        quota = Fraction(left * sizes[place], weight)
        assert abs(parts[place] - quota) < 2
    # A larger image never has less.
    ordered = sorted(zip(sizes, parts, strict=True))
    for (size, part), (larger, its) in zip(ordered, ordered[1:], strict=False):
        assert part <= its or size == larger


@pytest.mark.parametrize(
    ("total", "sizes", "parts"),
    [
        (10, [100, 200], [3, 7]),
        (10, [100, 100, 100], [4, 3, 3]),  # equal remainders: the earlier image
        (100, [576, 2928], [16, 84]),
        (100, [30, 40], [30, 40]),
        (4, [10, 1000, 1000], [1, 2, 1]),
        (5, [1, 1000], [1, 4]),
        (7, [7], [7]),
        (3, [2000, 3, 3], [1, 1, 1]),
        (640, [2144, 1776, 2144], [226, 188, 226]),
    ],
)
def test_parts_by_hand(total, sizes, parts):
    assert Total(total=total).share(sizes) == parts
    assert kept({"total": total}, sizes) == parts


def test_fewer_tokens_than_images_are_refused():
    with pytest.raises(FieldError, match='"total": 2} is fewer than the 3 images') as error:
        kept({"total": 2}, [50, 50, 50])
    assert error.value.field == "fsr_budget"
    assert kept({"total": 2}, []) == []  # text alone: nothing to divide


def test_the_servers_bounds_hold_for_every_part():
    bounds = {"min_budget": 4, "max_budget": 40}
    assert kept({"total": 60}, [100, 100], **bounds) == [30, 30]
    above = 'fsr_budget {"total": 60} gives an image of 300 tokens 45, above this server\'s maximum'
    with pytest.raises(FieldError, match="gives an image of 300 tokens 45") as error:
        kept({"total": 60}, [100, 300], **bounds)
    assert str(error.value) == f"{above} 40 (allowed: 4 to 40)"
    with pytest.raises(FieldError, match="gives an image of 100 tokens 3, below .* minimum 4"):
        kept({"total": 6}, [100, 100], **bounds)
    assert kept({"total": 50}, [3, 30], **bounds) == [3, 30]  # whole images are never too few


def test_budgets_are_the_same_whatever_their_spelling():
    assert same_budget({"total": 64}, {"total": 64.0})
    assert same_budget(Total(total=64), {"total": 64})
    for other in ({"total": 65}, {"total": True}, {"total": 64, "a": 1}, 64, [64], "off", {}):
        assert not same_budget({"total": 64}, other)
        assert not same_budget(other, Total(total=64))


def test_every_way_of_a_request_takes_a_total():
    body = {"fsr_budget": {"total": 640}}
    assert asked({}, **body) == body
    assert asked({}, mm_processor_kwargs=body) == body
    assert asked({}, xargs={"fsr_budget": '{"total": 640}'}) == body
    assert asked({}, header='{"total": 640}') == body
    assert asked({}, header='{"total": 640}, {"total":640.0}', **body) == body
    assert asked({}, header='{"total": 640}', fsr_budget={"total": 640.0}) == body
    alias = {"model_alias": True}
    assert asked(alias, model='a/b@fsr{"total":640}') == body
    for settings in ({"max_budget": 64, "tokens_per_image": 576}, {"tokens_per_image": 576}):
        assert asked(settings, header='{"total": 640}') == body  # judged with the images in hand
        assert asked({**settings, **alias}, model='m@fsr{"total":640}') == body
    assert after({}, fsr_budget={"total": 7})["fsr_request"].fields.fsr_budget == Total(total=7)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"header": '{"total": 64}', "fsr_budget": {"total": 65}}, "fsr_budget"),
        ({"header": '{"total": 64}', "fsr_budget": 64}, "fsr_budget"),
        ({"header": '{"total": 64}, 64'}, "x-fsr-budget"),
        ({"header": '{"total": 0}'}, "x-fsr-budget"),
        ({"header": '[{"total": 64}]'}, "x-fsr-budget"),
        ({"header": '{"total": 64, "x": 1}'}, "x-fsr-budget"),
        ({"fsr_budget": {"total": 64}, "xargs": {"fsr_budget": '{"total": 65}'}}, "fsr_budget"),
        ({"xargs": {"fsr_budget": "{"}}, "fsr_budget"),
        ({"model": 'm@fsr{"total":0}'}, "model"),
    ],
    ids=str,
)
def test_wrong_totals_name_the_place_they_came_by(said, name):
    with pytest.raises(ValueError, match=f"^{name}") as error:
        asked({"model_alias": True}, **said)
    assert error.value.parameter == name


def test_a_total_is_no_default_of_a_server():
    with pytest.raises(FieldError, match="fsr.budget must be"):
        ServerSettings.parse({"budget": {"total": 64}})
    with pytest.raises(FieldError, match="detail_budgets"):
        ServerSettings.parse({"detail_budgets": {"low": {"total": 64}}})


def test_a_share_in_a_header_waits_for_the_image_where_sizes_vary():
    bounds = {"max_budget": 600, "tokens_per_image": 2928}
    with pytest.raises(ValueError, match="x-fsr-budget 0.5 of 2928 = 1464, above"):
        asked(bounds, header="0.5")
    assert asked({**bounds, "one_size": False}, header="0.5") == {"fsr_budget": 0.5}
    assert asked({**bounds, "one_size": False, "model_alias": True}, model="m@fsr0.5")
    for one_size in (True, False):
        with pytest.raises(ValueError, match="x-fsr-budget 601, above"):
            asked({**bounds, "one_size": one_size}, header="601")


def test_the_schema_that_a_server_shows_stands_by_itself():
    shown = _inlined(RequestFields.model_json_schema())["fsr_budget"]
    (total,) = [one for one in shown["anyOf"] if one.get("type") == "object"]
    assert total["properties"]["total"]["maximum"] == 1_000_000
    assert "$ref" not in str(shown)
    assert fields.BUDGET_HEADER == "x-fsr-budget"


def test_errors_show_a_total_as_it_is_written():
    body = {"fsr_budget": 64}
    with pytest.raises(FieldError) as error:
        fields.with_header(body, '{"total":640}', ServerSettings())
    assert 'fsr_budget 64 in the body differs from {"total": 640} in' in str(error.value)
