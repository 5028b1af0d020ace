"""The main way: `vllm serve MODEL --plugin fsr` and the openai SDK, each request with its own
budget.
"""

import httpx
import pytest

from .conftest import KEY

pytestmark = pytest.mark.engine

WHAT = "What is this?"


@pytest.fixture(scope="module")
def server(main):
    return main


def test_a_budget_per_request(server, unpruned):
    assert unpruned["tokens"] == "576/576"
    for budget, kept in (
        (128, 128),
        (64, 64),
        (1, 1),
        (0.5, 288),
        (0.22, 127),
        ("off", 576),
        (576, 576),
        (1000, 576),
    ):
        answer = server.ask("chelsea", WHAT, fsr_budget=budget)
        assert answer["tokens"] == f"{kept}/576"
        assert answer["prompt"] == unpruned["prompt"] - 576 + kept
        if kept == 576:
            assert answer["text"] == unpruned["text"]


def test_a_uuid_may_not_look_like_an_identity_of_ours(server, unpruned):
    """It would be taken for a pruned image's, of another number of rows than this client is billed
    for.
    """
    messages = server.messages("chelsea", WHAT)
    for digest, status in (
        (f"fsr:576:{'0' * 64}", 400),
        ("fsr:", 400),
        ("fsr", 200),
        ("my fsr:picture", 200),
    ):
        messages[0]["content"][0]["uuid"] = digest
        for path in ("/v1/chat/completions", "/tokenize"):
            answer = server.post(
                {"model": "fsr-demo", "messages": messages, "max_tokens": 1, "fsr_budget": 64}, path
            )
            assert answer.status_code == status, answer.text
            if status == 400:
                assert answer.json()["error"]["param"] == "uuid"
                assert "'fsr:'" in answer.json()["error"]["message"]
    assert server.ask("chelsea", WHAT) == unpruned


def test_null_counts_as_absent(server, unpruned):
    assert server.ask("chelsea", WHAT, fsr_budget=None, fsr_method=None) == unpruned


def test_streaming(server):
    whole = server.ask("chelsea", WHAT, fsr_budget=64)
    raw = server.client.chat.completions.with_raw_response.create(
        model="fsr-demo",
        messages=server.messages("chelsea", WHAT),
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"fsr_budget": 64},
    )
    chunks = list(raw.parse())
    assert raw.headers["x-fsr-visual-tokens"] == "64/576" == whole["tokens"]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole["text"]
    assert chunks[-1].usage.prompt_tokens == whole["prompt"]


def test_header(server):
    by_field = server.ask("chelsea", WHAT, fsr_budget=64)
    assert server.ask("chelsea", WHAT, headers={"x-fsr-budget": "64"}) == by_field
    assert server.ask("chelsea", WHAT, headers={"X-FSR-Budget": "64"}, fsr_budget=64) == by_field
    assert server.ask("chelsea", WHAT, headers={"x-fsr-budget": "0.5"})["tokens"] == "288/576"
    assert (
        server.ask("chelsea", "rocket", WHAT, headers={"x-fsr-budget": '[8, "off"]'})["tokens"]
        == "584/1152"
    )


def test_several_images(server):
    parts = ("First", "chelsea", "then", "rocket", WHAT)
    whole = server.ask(*parts)
    assert whole["tokens"] == "1152/1152"
    for budget, kept in ((64, 128), ([64, "off"], 640), ([1, 0.25], 145), ({"total": 333}, 333)):
        answer = server.ask(*parts, fsr_budget=budget)
        assert answer["tokens"] == f"{kept}/1152"
        assert answer["prompt"] == whole["prompt"] - 1152 + kept


def test_a_total_over_all_images_by_every_way(server):
    parts = ("First", "chelsea", "then", "rocket", WHAT)
    by_body = server.ask(*parts, fsr_budget={"total": 333})
    assert server.ask(*parts, fsr_budget=[167, 166]) == by_body
    assert server.ask(*parts, headers={"x-fsr-budget": '{"total": 333}'}) == by_body
    asked = {"messages": server.messages(*parts), "max_tokens": 8, "temperature": 0}
    for body in (
        {"model": 'fsr-demo@fsr{"total":333}'},
        {"model": "fsr-demo", "vllm_xargs": {"fsr_budget": '{"total": 333}'}},
        {"model": "fsr-demo", "mm_processor_kwargs": {"fsr_budget": {"total": 333}}},
    ):
        answer = server.post({**asked, **body})
        assert answer.headers["x-fsr-visual-tokens"] == "333/1152", answer.text
        assert answer.json()["choices"][0]["message"]["content"] == by_body["text"]
    refused = server.post({**asked, "model": "fsr-demo", "fsr_budget": {"total": 1}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "fsr_budget"
    assert "fewer than the 2 images" in refused.json()["error"]["message"]


def test_text_only_has_nothing_to_prune(server):
    plain = server.ask(WHAT)
    assert server.ask(WHAT, fsr_budget=64, fsr_method="fsr", fsr_question="x") == plain
    assert plain["tokens"] is None


def test_the_question_matters_and_can_be_given(server):
    derived = server.ask("chelsea", WHAT, fsr_budget=32)
    assert server.ask("chelsea", WHAT, fsr_budget=32, fsr_question=WHAT) == derived
    texts = {
        server.ask("chelsea", WHAT, fsr_budget=32, fsr_question=q)["text"]
        for q in (WHAT, "a red flag", "")
    }
    assert len(texts) > 1


def test_a_long_text_is_served_and_its_end_is_the_question(server):
    long = "word " * 1100 + WHAT  # longer than the text tower reads
    raw = server.client.chat.completions.with_raw_response.create(
        model="fsr-demo",
        messages=server.messages("chelsea", long),
        max_tokens=1,
        extra_body={"fsr_budget": 32},
    )
    assert raw.headers["x-fsr-visual-tokens"] == "32/576"
    derived = server.ask("chelsea", long, fsr_budget=32)
    assert server.ask("chelsea", long, fsr_budget=32, fsr_question=long[-4096:]) == derived


def test_methods_and_options(server):
    texts = {
        server.ask("chelsea", WHAT, fsr_budget=48, fsr_method=m)["text"]
        for m in ("fsr", "random", "uniform")
    }
    assert len(texts) > 1
    paper = server.ask("chelsea", WHAT, fsr_budget=48, fsr_options={"preset": "paper"})
    assert paper["tokens"] == "48/576"
    assert (
        server.ask("chelsea", WHAT, fsr_budget=48, fsr_options={"rho": 0.2, "scan": "coverage"})[
            "tokens"
        ]
        == "48/576"
    )


def test_a_later_turn_leaves_the_image_as_it_was(server):
    first = server.messages("chelsea", WHAT)
    later = [
        *first,
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "Which colour?"},
    ]
    answers = []
    # Said outright, the question of the first turn gives the same answer in the second: it is what
    # was derived there.
    for question in ({}, {"fsr_question": WHAT}, {"fsr_question": "Which colour?"}):
        raw = server.client.chat.completions.with_raw_response.create(
            model="fsr-demo",
            messages=later,
            max_tokens=8,
            temperature=0,
            logprobs=True,
            extra_body={"fsr_budget": 32, **question},
        )
        assert raw.headers["x-fsr-visual-tokens"] == "32/576"
        answers.append([token.logprob for token in raw.parse().choices[0].logprobs.content])
    assert answers[0] == pytest.approx(answers[1], abs=1e-4)
    assert answers[0] != pytest.approx(answers[2], abs=1e-4)


def test_fields_on_completions_are_judged_too(server):
    url = f"{server.url}/completions"
    headers = {"authorization": f"Bearer {KEY}"}
    for budget, status in ((64, 200), ("many", 400)):
        body = {"model": "fsr-demo", "prompt": "Say", "max_tokens": 1, "fsr_budget": budget}
        assert httpx.post(url, json=body, headers=headers, timeout=60).status_code == status


def test_methods_are_listed_behind_the_key(server):
    listed = httpx.get(f"{server.url}/fsr/methods", headers={"authorization": f"Bearer {KEY}"})
    assert "fsr" in [entry["id"] for entry in listed.json()["data"]]
    assert httpx.get(f"{server.url}/fsr/methods").status_code == 401


def test_the_server_lives_on(server, unpruned):
    assert server.ask("chelsea", WHAT) == unpruned
    assert "Traceback" not in server.log.read_text()
