"""Wrong values in every field, against the main server: 400 that names the field; it lives on."""

import json

import openai
import pytest

pytestmark = pytest.mark.engine

WHAT = "What is this?"


@pytest.fixture(scope="module")
def server(main):
    return main


BAD_BUDGETS = [
    0,
    -1,
    1.0,
    1.5,
    -2.0,
    True,
    "many",
    "128",
    10**12,
    [],
    [64, 64, 64],
    [0],
    {},
    [[64]],
]


@pytest.mark.parametrize("budget", BAD_BUDGETS, ids=repr)
def test_bad_budgets(server, budget):
    refused(server, "fsr_budget", {"fsr_budget": budget})


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("fsr_method", {"fsr_method": "nope"}),
        ("fsr_method", {"fsr_method": 3}),
        ("fsr_options", {"fsr_options": {"nope": 1}}),
        ("fsr_options", {"fsr_options": {"rho": 1.5}}),
        ("fsr_options", {"fsr_options": {"alpha": "three"}}),
        ("fsr_options", {"fsr_options": {"preset": "best"}}),
        ("fsr_options", {"fsr_options": [1]}),
        ("fsr_question", {"fsr_question": 5}),
        ("fsr_question", {"fsr_question": ["a", "b"]}),
        ("fsr_question", {"fsr_question": ["x"] * 20_000}),
        ("fsr_budget", {"fsr_budget": [64] * 20_000}),
        ("fsr_options", {"fsr_options": {"kappa": 1e308}}),
        ("fsr_options", {"fsr_options": {"alpha": 10**400}}),
        ("fsr_options", {"fsr_options": {"name": "x"}}),
        ("fsr_bugdet", {"fsr_bugdet": 64}),
        ("fsr_budget", {"fsr_budget": 64, "mm_processor_kwargs": {"fsr_budget": 32}}),
        ("mm_processor_kwargs", {"fsr_budget": 64, "mm_processor_kwargs": {"num_crops": 4}}),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_fields(server, field, fields, stream):
    refused(server, field, {"fsr_budget": 64, **fields, "stream": stream})


def test_a_question_that_is_too_long(server):
    refused(server, "fsr_question", {"fsr_budget": 32, "fsr_question": "x" * 5000})


def refused(server, field, fields, headers=None):
    """HTTP 400 in the OpenAI error shape, naming the field."""
    with pytest.raises(openai.BadRequestError) as error:
        server.ask("chelsea", WHAT, headers=headers, **fields)
    assert error.value.body["param"] == field
    assert error.value.body["code"] == 400
    assert field in error.value.body["message"]


def test_bad_headers(server):
    for value in ("many", "0", "1.0", "NaN", "true", "", "64, 65", "[" * 5000):
        refused(server, "x-fsr-budget", {}, headers={"x-fsr-budget": value})
    refused(server, "fsr_budget", {"fsr_budget": 64}, headers={"x-fsr-budget": "65"})


def body(server, **fields):
    return {
        "model": "fsr-demo",
        "messages": server.messages("chelsea", WHAT),
        "max_tokens": 2,
        **fields,
    }


def test_nan_is_refused_although_json_readers_take_it(server):
    text = json.dumps(body(server, fsr_budget="HERE")).replace('"HERE"', "NaN")
    answer = server.post(text)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "fsr_budget"


def test_half_a_surrogate_pair_is_no_text(server, unpruned):
    answer = server.post(
        body(server, fsr_budget=64, fsr_question="half \ud800")
    )  # JSON can say that
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "fsr_question"
    messages = server.messages("chelsea", "half \ud800")
    assert server.post({**body(server, fsr_budget=64), "messages": messages}).status_code in (
        200,
        400,
    )
    assert server.ask("chelsea", WHAT) == unpruned


def test_what_vllm_answers_itself_stays_as_it_is(server):
    assert server.post("{not json").status_code in (400, 422)
    assert server.post("{}").status_code in (400, 422)
    assert server.post(
        json.dumps(body(server)), headers={"content-type": "text/plain"}
    ).status_code in (400, 415, 422)
    messages = server.messages("chelsea", WHAT)
    messages[0]["content"][0]["image_url"]["url"] = "data:image/png;base64,aGVsbG8="
    corrupt = server.post({**body(server, fsr_budget=64), "messages": messages})
    assert 400 <= corrupt.status_code < 500
    assert "error" in corrupt.json()
    unauthorised = server.post(
        body(server, fsr_budget="many"), headers={"authorization": "Bearer wrong"}
    )
    assert unauthorised.status_code == 401


def test_the_server_lives_on(server, unpruned):
    assert server.ask("chelsea", WHAT) == unpruned
    assert "Traceback" not in server.log.read_text()
