"""What conversations say, on a real server: questions before their image, images beyond the limit,
embeddings.
"""

import base64
import io
import json

import psutil
import pytest
import torch
from PIL import Image

from .conftest import NAME, embedded

pytestmark = pytest.mark.engine

TOKENS = "x-fsr-visual-tokens"
WHO, WHAT = "Who has a red flag and a white helmet?", "What is this?"
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]}


@pytest.fixture(scope="module")
def server(main):
    return main


def user(*content):
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def chances(server, messages, **fields):
    """Log-probabilities of a greedy answer, which tell questions apart where texts need not."""
    body = {
        "model": NAME,
        "messages": messages,
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": True,
        **fields,
    }
    answer = server.post({"fsr_budget": 16, **body})
    assert answer.status_code == 200, answer.text[:500]
    assert answer.headers[TOKENS] == "16/576"
    return [token["logprob"] for token in answer.json()["choices"][0]["logprobs"]["content"]]


def asks(server, messages, question):
    derived = chances(server, messages)
    same = chances(server, messages, fsr_question=question)
    others = [
        chances(server, messages, fsr_question=other)
        for other in ("", WHO, WHAT)
        if other != question
    ]
    return derived == pytest.approx(same, abs=1e-4) and all(
        derived != pytest.approx(other, abs=1e-4) for other in others
    )


@pytest.mark.parametrize("place", ["message", "tool", "tool and more"])
def test_a_question_may_come_before_its_image(server, place):
    image = server.messages("chelsea")[0]["content"][0]
    tool = {"role": "tool", "tool_call_id": "call_1", "content": [image]}
    messages = {
        "message": [user(WHO), user(image)],
        "tool": [user(WHO), CALLED, tool],
        "tool and more": [user(WHAT), CALLED, {**tool, "content": "no"}, CALLED, tool, user(WHO)],
    }[place]
    assert asks(server, messages, WHO)
    later = [*messages, {"role": "assistant", "content": "A cat."}, user(WHAT)]
    assert asks(server, later, WHO)


def test_an_image_in_a_tools_result_on_messages(server):
    source = {
        "type": "base64",
        "media_type": "image/jpeg",
        "data": server.pictures["chelsea"].split(",")[1],
    }
    messages = [
        user(WHO),
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "t1", "name": "look", "input": {}}],
        },
        user(
            {
                "type": "tool_result",
                "tool_use_id": "t1",
                "content": [{"type": "image", "source": source}],
            }
        ),
    ]

    def text(**fields):
        body = {
            "model": NAME,
            "messages": messages,
            "max_tokens": 24,
            "temperature": 0,
            "fsr_budget": 16,
            **fields,
        }
        answer = server.post(body, "/v1/messages")
        assert answer.status_code == 200, answer.text[:500]
        assert answer.headers[TOKENS] == "16/576"
        return answer.json()["content"][0]["text"]

    assert text() == text(fsr_question=WHO)
    assert len({text(fsr_question=question) for question in ("", WHO)}) == 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_images_beyond_the_limit_cost_nothing_before_vllm_refuses_them(server, path):
    data = io.BytesIO()
    Image.new("RGB", (1, 1)).save(data, "PNG")
    part = {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"},
    }
    messages = [user(*[part] * 2500), *(user(letter * 500_000) for letter in "ab")]
    port = int(server.url.removesuffix("/v1").rpartition(":")[2])
    (pid,) = {
        c.pid
        for c in psutil.net_connections("tcp")
        if c.status == "LISTEN" and c.laddr.port == port
    }
    before = psutil.Process(pid).memory_info().rss
    for fields in ({}, {"fsr_budget": 64}, {"fsr_budget": [64] * 2}):
        answer = server.post({"model": NAME, "messages": messages, "max_tokens": 1, **fields}, path)
        error = answer.json()["error"]
        assert answer.status_code == 400
        assert "At most 2 image(s)" in error["message"]
        assert error["param"] == "image"
    assert psutil.Process(pid).memory_info().rss - before < 500e6
    many = server.post(
        {"model": NAME, "messages": messages, "max_tokens": 1, "fsr_budget": [64] * 2500}, path
    )
    assert many.status_code == 400
    assert many.json()["error"]["param"] == "fsr_budget"
    assert len(many.text) < 400


def embeds(server, rows, path="/v1/chat/completions", headers=None, **fields):
    return server.post(embedded(server, rows, **fields), path, headers=headers or {})


def test_embeddings_are_never_pruned(server):
    whole = server.ask("chelsea", WHAT)["prompt"]
    for fields in (
        {},
        {"fsr_budget": "off"},
        {"fsr_budget": ["off"]},
        {"fsr_method": "random"},
        {"fsr_question": "q"},
    ):
        answer = embeds(server, [576], **fields)
        assert answer.status_code == 200, answer.text[:500]
        assert answer.headers[TOKENS] == "576/576"
        assert answer.json()["usage"]["prompt_tokens"] == whole
    # vLLM's own LLaVA wants embeddings of one size in a batch, and its engine stops at others.
    assert embeds(server, [100, 100]).headers[TOKENS] == "200/200"
    tokenized = embeds(server, [100], "/tokenize")
    assert tokenized.headers[TOKENS] == "100/100"
    assert tokenized.json()["count"] == whole - 476


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_a_budget_for_embeddings_is_refused(server, path):
    for fields, headers in (
        ({"fsr_budget": 64}, {}),
        ({"fsr_budget": 0.5}, {}),
        ({"fsr_budget": 600}, {}),
        ({"fsr_budget": ["off", 64]}, {}),
        ({}, {"x-fsr-budget": "64"}),
        ({"model": f"{NAME}@fsr64"}, {}),
    ):
        answer = embeds(server, [576, 576], path, headers, **fields)
        assert answer.status_code == 400, fields
        error = answer.json()["error"]
        assert error["param"] == "fsr_budget"
        assert "image_embeds" in error["message"]
    counted = embeds(server, [576, 576], path, fsr_budget=["off"])
    assert counted.status_code == 400
    assert "2 image(s)" in counted.json()["error"]["message"]
    assert embeds(server, [9, 9], path, fsr_budget=["off", "off"]).headers[TOKENS] == "18/18"


def test_nothing_that_is_derived_can_be_sent(server):
    for value in ({"questions": ["q"], "budgets": [1]}, ["q"], json.dumps({"questions": ["q"]})):
        for fields in ({"fsr_derived": value}, {"mm_processor_kwargs": {"fsr_derived": value}}):
            answer = embeds(server, [9], **fields)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "fsr_derived"


def test_the_server_lives_on(server):
    assert torch.isfinite(torch.tensor(chances(server, server.messages("chelsea", WHAT)))).all()
    assert "Traceback" not in server.log.read_text()
