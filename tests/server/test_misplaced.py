"""Fields of ours in a wrong place or spelling: refused with the place where they belong, on every
endpoint.
"""

import copy
from types import SimpleNamespace

import openai
import pytest

from fsr_vllm.server import misplaced

from .conftest import NAME
from .test_surfaces import SURFACES, WHAT, chat

engine = pytest.mark.engine

PART = {"type": "image_url", "image_url": {"url": "u", "detail": "low"}}
TEXT = {"type": "text", "text": "fsr_budget"}


def field(body, images=4):
    """The path that is named for a body, parsed by a model that keeps unknown fields or as plain
    JSON.
    """
    error = misplaced.in_body(body, images)
    known = {
        "messages",
        "input",
        "metadata",
        "chat_template_kwargs",
        "mm_processor_kwargs",
        "vllm_xargs",
    }
    named = {k: v for k, v in body.items() if k in known}
    request = SimpleNamespace(
        model_extra={k: v for k, v in body.items() if k not in known}, **named
    )
    assert str(misplaced.in_body(request, images)) == str(error)
    return None if error is None else error.field


def user(*parts, **more):
    return {"role": "user", "content": list(parts), **more}


@pytest.mark.parametrize(
    "key", ["fsr-budget", "fsrBudget", "FSR_BUDGET", "Fsr_Budget", "fsrbudget", "_fsr__budget"]
)
def test_any_spelling_is_found_in_any_place(key):
    assert field({key: 64}) == key
    for place in (
        "extra_body",
        "metadata",
        "chat_template_kwargs",
        "mm_processor_kwargs",
        "vllm_xargs",
    ):
        assert field({place: {"other": 1, key: 64}}) == f"{place}.{key}"
    assert (
        field({"messages": [user(TEXT), user(TEXT, {**PART, key: 64})]})
        == f"messages[1].content[1].{key}"
    )
    assert field({"messages": [user(TEXT, **{key: 64})]}) == f"messages[0].{key}"


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (
            {
                "messages": [
                    user({"type": "tool_result", "content": [TEXT, {**PART, "fsr_budget": 8}]})
                ]
            },
            "messages[0].content[0].content[1].fsr_budget",
        ),
        ({"extra_body": {"fsr_budget": 64}}, "extra_body.fsr_budget"),
        ({"metadata": {"fsr_question": "x"}}, "metadata.fsr_question"),
        ({"chat_template_kwargs": {"fsr_options": {}}}, "chat_template_kwargs.fsr_options"),
        ({"fsr_budget": 64, "fsrMethod": "fsr"}, "fsrMethod"),
        (
            {"messages": [user({**PART, "image_url": {"url": "u", "fsr_budget": 8}})]},
            "messages[0].content[0].image_url.fsr_budget",
        ),
        (
            {"messages": [[user(TEXT)], [user({**PART, "fsr_budget": 8})]]},
            "messages[1][0].content[0].fsr_budget",
        ),
        (
            {"input": [user({"type": "input_image", "image_url": "u", "fsr_budget": 8})]},
            "input[0].content[0].fsr_budget",
        ),
        (
            {"messages": [user({"type": "image", "source": {"data": "x", "fsr_budget": 8}})]},
            "messages[0].content[0].source.fsr_budget",
        ),
        ({"inputs": [{"content": [{**PART, "fsr_budget": 8}]}]}, "inputs[0].content[0].fsr_budget"),
        ({"content_parts": [TEXT, {**PART, "fsr_budget": 8}]}, "content_parts[1].fsr_budget"),
    ],
)
def test_the_path_is_the_clients_own(body, path):
    assert field(body) == path


@pytest.mark.parametrize(
    "body",
    [
        {"fsr_budget": 64, "fsr_method": "fsr", "fsr_options": {}, "fsr_question": ""},
        {"mm_processor_kwargs": {"fsr_budget": 64}, "vllm_xargs": {"fsr_budget": 64}},
        {
            "fsrBudget": None,
            "extra_body": {"fsr_budget": None},
            "metadata": None,
            "chat_template_kwargs": 5,
        },
        {
            "messages": [user({**PART, "fsr_budget": None})],
            "input": "fsr_budget",
            "extra_body": ["fsr_budget"],
        },
        {"metadata": {"budget": 64, "fsr_plan": 1, "fsr": 3, "deeper": {"fsr_budget": 64}}},
        {"messages": [user({**TEXT, "deeper": {"fsr_budget": 64}})], "tools": [{"fsr_budget": 64}]},
        {
            "input": [[1, 2, 3]],
            "messages": [None, user(None, "fsr_budget")],
            "inputs": {"content": []},
        },
        {"fsr_budget" + "_" * 1000: 64, "x" * 100_000: 1},
    ],
)
def test_what_is_right_null_or_none_of_ours_is_left_alone(body):
    assert field(body) is None


class Part(dict):
    """A content part that counts how often it is looked at."""

    seen = 0

    def get(self, *args):
        Part.seen += 1
        return super().get(*args)


def test_no_more_is_looked_at_than_the_server_takes_images():
    many = [Part(PART) for _ in range(2500)]
    per_part = 3  # its type, and the two objects it may hold
    late = user({**PART, "fsr_budget": 8})
    for messages in (
        [user(*many), late],
        [*(user(part) for part in many), late],
        [[user(*many), late]],
    ):
        Part.seen = 0
        assert field({"messages": messages}, images=10) is None
        assert 0 < Part.seen <= 2 * 11 * per_part  # `field` asks twice
    within = [user(*many[:9]), user({**PART, "fsr_budget": 8})]
    assert field({"messages": within}, images=10) == "messages[1].content[0].fsr_budget"


def test_headers():
    assert misplaced.in_headers(["host", "x-fsr-budget", "fsr", "x-other"]) is None
    for name in (
        "x-fsr-method",
        "x-fsr-budgets",
        "x-fsr-visual-tokens",
        "fsr-budget",
        "fsr_budget",
        "x_fsr_budget",
    ):
        error = misplaced.in_headers(["host", name])
        assert error.field == name
        assert "x-fsr-budget" in str(error)
    assert len(misplaced.in_headers(["x-fsr-" + "y" * 9000]).field) == 80


# --- on a real server -----------------------------------------------------------------------------

PLACES = {
    "fsrBudget": ({"fsrBudget": 64}, {}),
    "fsr-budget": ({"fsr-budget": 64, "fsr_budget": 64}, {}),
    "FSR_BUDGET": ({"FSR_BUDGET": 64}, {}),
    "extra_body.fsr_budget": ({"extra_body": {"fsr_budget": 64}}, {}),
    "extra_body.fsrMethod": ({"extra_body": {"fsrMethod": "fsr"}}, {}),
    "metadata.fsr_budget": ({"metadata": {"fsr_budget": "64"}}, {}),
    "chat_template_kwargs.fsr_budget": ({"chat_template_kwargs": {"fsr_budget": 64}}, {}),
    "x-fsr-method": ({}, {"x-fsr-method": "fsr"}),
    "x-fsr-budgets": ({}, {"x-fsr-budgets": "64", "x-fsr-budget": "64"}),
    "fsr-question": ({}, {"fsr-question": "What?"}),
}
# What a part is reached by, where it is not messages[0].content[0]
INPUT = "input[0].content[0]"
ROUTES = {"batch": "messages[0][0].content[0]", "responses": INPUT, "responses render": INPUT}


@engine
@pytest.mark.parametrize("surface", SURFACES)
def test_every_endpoint_says_where_a_field_belongs(main, surface):
    path, body, _ = SURFACES[surface]
    cases = [(name, body(main, **fields), headers) for name, (fields, headers) in PLACES.items()]
    route = ROUTES.get(surface, "messages[0].content[0]")
    for inner in ("", "image_url", "source"):
        given = copy.deepcopy(body(main))
        part = given.get("messages", given.get("input"))
        while isinstance(part, list) or "content" in part:
            part = part[0] if isinstance(part, list) else part["content"]
        holder = part if not inner else part.get(inner)
        if isinstance(holder, dict):
            holder["fsr_budget"] = 64
            cases.append((f"{route}.{inner}{'.' if inner else ''}fsr_budget", given, {}))
    assert len(cases) > len(PLACES)
    for name, given, headers in cases:
        answer = main.post(given, path, headers=headers)
        assert answer.status_code == 400, (name, answer.text[:500])
        error = answer.json()["error"]
        assert f"{name} is not read" in error["message"]
        assert len(error["message"]) < 400
        if surface in ("messages", "count_tokens"):
            assert answer.json()["type"] == "error"  # Anthropic's shape has no param
        else:
            assert error["param"] == name


@engine
def test_text_endpoints_too(main):
    for path, body in (
        ("/v1/completions", {"prompt": "Say", "max_tokens": 1}),
        ("/tokenize", {"prompt": "Say"}),
        ("/detokenize", {"tokens": [5, 6]}),
    ):
        assert (
            main.post({"model": NAME, **body, "metadata": {"plan": "fsr"}}, path).status_code == 200
        )
        for name, fields in (
            ("fsrBudget", {"fsrBudget": 1}),
            ("extra_body.fsr_budget", PLACES["extra_body.fsr_budget"][0]),
        ):
            refused = main.post({"model": NAME, **body, **fields}, path)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == name


@engine
def test_the_openai_sdk_shows_it(main):
    with pytest.raises(
        openai.BadRequestError, match="extra_body is an argument of OpenAI's Python SDK"
    ) as error:
        main.ask(
            "chelsea", WHAT, extra_body={"fsr_budget": 64}
        )  # as its users write it in JavaScript
    assert error.value.body["param"] == "extra_body.fsr_budget"
    assert (
        main.ask("chelsea", WHAT, fsr_budget=64, fsrBudget=None, extra_body=None)["tokens"]
        == "64/576"
    )


@engine
def test_rendered_requests_too(main):
    rendered = main.post(chat(main, fsr_budget=64), "/v1/chat/completions/render").json()
    assert main.post(rendered, "/inference/v1/generate").status_code == 200
    refused = main.post({**rendered, "fsrBudget": 64}, "/inference/v1/generate")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "fsrBudget"
