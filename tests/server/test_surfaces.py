"""Every other endpoint of the same server: where a budget is given there, what is answered, and
what is refused.
"""

import json

import httpx
import openai
import pytest

from .conftest import KEY, NAME, ORIGIN

pytestmark = pytest.mark.engine

WHAT = "What is this?"
TOKENS = "x-fsr-visual-tokens"


@pytest.fixture(scope="module")
def server(main):
    return main


@pytest.fixture(scope="module")
def text_tokens(server):
    """Prompt tokens of the shared chat prompt without its image."""
    return server.ask("chelsea", WHAT, fsr_budget=1)["prompt"] - 1


def anthropic(server, *parts, **fields):
    """The same messages in Anthropic's shape."""

    def source(url):
        return {"type": "base64", "media_type": "image/jpeg", "data": url.split(",")[1]}

    content = [
        {"type": "image", "source": source(server.pictures[part])}
        if part in server.pictures
        else {"type": "text", "text": part}
        for part in parts
    ]
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 4,
        **fields,
    }


def responses(server, *parts):
    content = [
        {"type": "input_image", "image_url": server.pictures[part], "detail": "auto"}
        if part in server.pictures
        else {"type": "input_text", "text": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def chat(server, **fields):
    return {
        "model": NAME,
        "messages": server.messages("chelsea", WHAT),
        "max_tokens": 4,
        "temperature": 0,
        **fields,
    }


# Per surface: path, body of a one-image request, and where the answer counts prompt tokens.
SURFACES = {
    "chat": ("/v1/chat/completions", chat, lambda j: j["usage"]["prompt_tokens"]),
    "batch": (
        "/v1/chat/completions/batch",
        lambda s, **f: {**chat(s, **f), "messages": [s.messages("chelsea", WHAT)]},
        lambda j: j["usage"]["prompt_tokens"],
    ),
    "responses": (
        "/v1/responses",
        lambda s, **f: {
            "model": NAME,
            "input": responses(s, "chelsea", WHAT),
            "max_output_tokens": 4,
            **f,
        },
        lambda j: j["usage"]["input_tokens"],
    ),
    "messages": (
        "/v1/messages",
        lambda s, **f: anthropic(s, "chelsea", WHAT, **f),
        lambda j: sum(
            j["usage"][k]
            for k in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
        ),
    ),
    "count_tokens": (
        "/v1/messages/count_tokens",
        lambda s, **f: anthropic(s, "chelsea", WHAT, **f),
        lambda j: j["input_tokens"],
    ),
    "tokenize": ("/tokenize", chat, lambda j: j["count"]),
    "render": ("/v1/chat/completions/render", chat, lambda j: len(j["token_ids"])),
    "responses render": (
        "/v1/responses/render",
        lambda s, **f: {"model": NAME, "input": responses(s, "chelsea", WHAT), **f},
        lambda j: len(j["token_ids"]),
    ),
    "messages render": (
        "/v1/messages/render",
        lambda s, **f: anthropic(s, "chelsea", WHAT, **f),
        lambda j: len(j["token_ids"]),
    ),
}


@pytest.mark.parametrize("surface", SURFACES)
def test_a_budget_by_body_header_and_name(server, surface):
    path, body, count = SURFACES[surface]
    whole = server.post(body(server), path)
    assert whole.headers[TOKENS] == "576/576"
    unpruned = count(whole.json())
    for kept, fields, headers in (
        (64, {"fsr_budget": 64}, {}),
        (65, {}, {"x-fsr-budget": "65"}),
        (66, {"model": f"{NAME}@fsr66"}, {}),
        (144, {"model": f"{NAME}@fsr0.25"}, {}),
        (67, {"model": f"{NAME}@fsr66", "fsr_budget": 67}, {}),
        (68, {"model": f"{NAME}@fsr66"}, {"x-fsr-budget": "68"}),
        (576, {"model": f"{NAME}@fsroff"}, {}),
    ):
        answer = server.post(body(server, **fields), path, headers=headers)
        assert answer.status_code == 200, answer.text[:500]
        assert answer.headers[TOKENS] == f"{kept}/576"
        assert count(answer.json()) == unpruned - 576 + kept


WRONG = [
    ("fsr_budget", {"fsr_budget": "many"}, {}),
    ("fsr_budget", {"fsr_budget": [1, 2]}, {}),
    ("fsr_budget", {"fsr_budget": 64}, {"x-fsr-budget": "65"}),
    ("x-fsr-budget", {}, {"x-fsr-budget": "1.0"}),
    ("fsr_method", {"fsr_method": 3}, {}),
    ("fsr_options", {"fsr_options": "rho"}, {}),
    ("fsr_bugdet", {"fsr_bugdet": 64}, {}),
    ("model", {"model": f"{NAME}@fsr0"}, {}),
    ("model", {"model": f"{NAME}@fsr1.0"}, {}),
    ("model", {"model": f"{NAME}@fsr[1,2]"}, {}),
]


@pytest.mark.parametrize("surface", SURFACES)
def test_wrong_values_are_the_clients_error_and_name_the_field(server, surface):
    path, body, _ = SURFACES[surface]
    for field, fields, headers in WRONG:
        answer = server.post(body(server, **fields), path, headers=headers)
        assert answer.status_code == 400, (fields, headers, answer.text[:500])
        error = answer.json()["error"]
        assert field in error["message"]
        if surface in ("messages", "count_tokens"):
            assert answer.json()["type"] == "error"
            assert set(error) == {
                "type",
                "message",
            }
        else:
            assert error["param"] == field
            assert error["code"] == 400
    assert server.post(body(server, model="nope@fsr64"), path).status_code == 404
    assert server.post(body(server, model=f"{NAME}@64"), path).status_code == 404


def test_vllms_own_carrier_of_extra_arguments(server):
    for path, body in (("/v1/chat/completions", chat), ("/v1/messages", SURFACES["messages"][1])):
        for xargs in ({"fsr_budget": 64}, {"fsr_budget": 64, "fsr_options": '{"rho": 0.5}'}):
            assert server.post(body(server, vllm_xargs=xargs), path).headers[TOKENS] == "64/576"
        both = server.post(body(server, vllm_xargs={"fsr_budget": 64}, fsr_budget=65), path)
        assert both.status_code == 400
        assert "fsr_budget" in both.json()["error"]["message"]
    assert (
        server.post(chat(server, vllm_xargs={"fsr_budget": True})).headers[TOKENS] == "1/576"
    )  # vLLM makes it 1


@pytest.mark.parametrize("surface", ["chat", "messages", "count_tokens"])
def test_vllms_own_carrier_of_processor_options(server, surface):
    path, body = SURFACES[surface][:2]
    fields = {"fsr_budget": 64, "fsr_method": "random"}
    assert server.post(body(server, mm_processor_kwargs=fields), path).headers[TOKENS] == "64/576"
    for wrong in ({"fsr_budget": "nonsense"}, {"fsr_foo": 1}, {"fsrBudget": 64}):
        assert server.post(body(server, mm_processor_kwargs=wrong), path).status_code == 400
    both = server.post(
        body(server, mm_processor_kwargs=fields, vllm_xargs={"fsr_budget": 65}), path
    )
    assert both.status_code == 400
    assert "fsr_budget" in both.json()["error"]["message"]


def test_the_openai_sdk_on_responses(server):
    def ask(**extra):
        return server.client.responses.with_raw_response.create(
            input=responses(server, "chelsea", WHAT),
            max_output_tokens=4,
            temperature=0,
            **{"model": NAME, **extra},
        )

    by_body, by_name = ask(extra_body={"fsr_budget": 64}), ask(model=f"{NAME}@fsr64")
    assert by_body.headers[TOKENS] == by_name.headers[TOKENS] == "64/576"
    assert by_body.parse().output_text == by_name.parse().output_text
    assert ask().parse().usage.input_tokens - by_body.parse().usage.input_tokens == 512
    with pytest.raises(openai.BadRequestError) as error:
        ask(extra_body={"fsr_budget": 0})
    assert error.value.body["param"] == "fsr_budget"


def test_messages_streams_and_asks_what_chat_asks(server):
    body = anthropic(server, "chelsea", WHAT, fsr_budget=32, temperature=0)
    whole = server.post(body, "/v1/messages").json()["content"][0]["text"]
    assert (
        whole == server.post(chat(server, fsr_budget=32)).json()["choices"][0]["message"]["content"]
    )
    streamed = server.post({**body, "stream": True}, "/v1/messages")
    assert streamed.headers[TOKENS] == "32/576"
    events = [
        json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")
    ]
    assert (
        "".join(e["delta"].get("text", "") for e in events if e["type"] == "content_block_delta")
        == whole
    )


def test_batches_settle_each_conversation_by_itself(server):
    two = [
        server.messages("chelsea", WHAT),
        server.messages("rocket", "chelsea", "Who has a red flag?"),
    ]
    answer = server.post(
        {**chat(server, fsr_budget=0.25), "messages": two}, "/v1/chat/completions/batch"
    )
    assert answer.headers[TOKENS] == f"{3 * 144}/{3 * 576}"
    texts = [choice["message"]["content"] for choice in answer.json()["choices"]]
    for messages, text in zip(two, texts, strict=True):
        alone = server.post({**chat(server, fsr_budget=0.25), "messages": messages}).json()
        assert alone["choices"][0]["message"]["content"] == text


def test_usage_counts_what_is_kept(server):
    usage = server.post(chat(server, fsr_budget=64)).json()["usage"]
    assert usage["prompt_tokens_details"]["multimodal_tokens"] == {"image": 64}


def test_text_endpoints_know_the_names(server):
    text = server.client.completions.create(model=NAME, prompt="Say", max_tokens=2, temperature=0)
    named = server.client.completions.create(
        model=f"{NAME}@fsr64", prompt="Say", max_tokens=2, temperature=0
    )
    assert named.choices[0].text == text.choices[0].text
    assert named.model == NAME
    ids = {"tokens": [5, 6]}
    plain = server.post({"model": NAME, **ids}, "/detokenize").json()
    assert server.post({"model": f"{NAME}@fsr64", **ids}, "/detokenize").json() == plain
    wrong = server.post({"model": NAME, **ids, "fsr_budget": 0}, "/detokenize")
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "fsr_budget"


def test_sagemakers_endpoint_takes_the_name_from_its_own_header(server):
    adapter = "x-amzn-sagemaker-adapter-identifier"
    for kept, fields, headers in (
        (64, {"fsr_budget": 64}, {}),
        (65, {}, {"x-fsr-budget": "65"}),
        (66, {}, {adapter: f"{NAME}@fsr66"}),
        (576, {}, {}),
    ):
        assert (
            server.post(chat(server, **fields), "/invocations", headers=headers).headers[TOKENS]
            == f"{kept}/576"
        )
    wrong = server.post(chat(server), "/invocations", headers={adapter: f"{NAME}@fsr0"})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "model"


def test_names_with_budgets_are_not_listed(server):
    assert [model.id for model in server.client.models.list()] == [NAME]


def test_rendered_requests_are_served_as_rendered(server):
    path = "/inference/v1/generate"
    rendered = server.post(chat(server, fsr_budget=64), "/v1/chat/completions/render").json()
    done = server.post(rendered, path)
    assert done.status_code == 200
    assert done.json()["usage"]["prompt_tokens"] == len(rendered["token_ids"])
    for field, fields, headers in (
        ("fsr_budget", {"fsr_budget": 64}, {}),
        ("x-fsr-budget", {}, {"x-fsr-budget": "64"}),
        ("model", {"model": f"{NAME}@fsr64"}, {}),
    ):
        refused = server.post({**rendered, **fields}, path, headers=headers)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == field
    ids = server.post(
        {"model": NAME, "prompt": f"USER: <image>\n{WHAT} ASSISTANT:"}, "/tokenize"
    ).json()["tokens"]
    parts = [{"type": "image_url", "url": server.pictures["chelsea"]}]
    sampling = {"max_tokens": 1}
    raw = server.post(
        {"model": NAME, "token_ids": ids, "content_parts": parts, "sampling_params": sampling}, path
    )
    assert raw.status_code == 200
    assert raw.json()["usage"]["prompt_tokens"] == len(ids) - 1 + 576


def test_pages_of_other_origins_may_send_and_read_the_headers(server):
    answer = server.post(chat(server, fsr_budget=64), headers={"origin": ORIGIN})
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert TOKENS in answer.headers["access-control-expose-headers"]
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "x-fsr-budget",
    }
    allowed = httpx.options(
        f"{server.url}/chat/completions", headers={"origin": ORIGIN, **preflight}
    )
    assert allowed.status_code == 200
    assert "x-fsr-budget" in allowed.headers["access-control-allow-headers"]


def test_the_server_lives_on(server, text_tokens):
    assert (
        server.ask("chelsea", WHAT, headers={"authorization": f"Bearer {KEY}"})["prompt"]
        == text_tokens + 576
    )
    assert "Traceback" not in server.log.read_text()
