"""What a server tells of its options, budgets in other spellings, and a server that leaves the
plugin aside.
"""

import httpx
import openai
import pytest

import fsr_vllm
from fsr_vllm.params import build_method

from .conftest import KEY, NAME

pytestmark = pytest.mark.engine

WHAT = "What is this?"


# --- the shared server ----------------------------------------------------------------------------


def test_the_configuration_of_a_server_without_limits(main):
    found = main.get("/v1/fsr/config")
    methods, options = found.pop("methods"), found.pop("options")
    assert found == {
        "object": "fsr.config",
        "version": fsr_vllm.__version__,
        "ignored": False,
        "prunes": True,
        "min_budget": 1,
        "max_budget": None,
        "default_budget": "off",
        "default_tokens": 576,
        "adaptive": None,
        "detail_budgets": {},
        "tokens_per_image": 576,
        "one_size": True,
        "method": "fsr",
        "text_encoder": "text_encoder",  # a folder of this machine: its last part alone
        "model_alias": True,
        "encoder_limit": "unpruned",
    }
    assert options["alpha"] == build_method("fsr", None).alpha
    assert {"fsr", "cdpruner", "random"} <= set(methods)
    assert "fastv" not in methods
    for method in methods:  # each is served as the answer says
        assert main.ask("chelsea", WHAT, fsr_budget=32, fsr_method=method)["tokens"] == "32/576"


def test_the_configuration_asks_for_the_key_and_no_worker(main):
    assert httpx.get(f"{main.url}/fsr/config").status_code == 401
    before = main.log.read_text().count("collective_rpc")
    assert main.get("/v1/fsr/config") == main.get("/v1/fsr/config")
    assert main.log.read_text().count("collective_rpc") == before


def test_the_schema_of_the_server_shows_our_fields(main):
    schema = main.get("/openapi.json")
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize"):
        post = schema["paths"][path]["post"]
        assert "x-fsr-budget" in [each["name"] for each in post["parameters"]]
        body = post["requestBody"]["content"]["application/json"]["schema"]
        names = [each["$ref"].rpartition("/")[2] for each in body.get("anyOf", [body])]
        for name in names:
            properties = schema["components"]["schemas"][name]["properties"]
            assert {"fsr_budget", "fsr_method", "fsr_options", "fsr_question"} <= properties.keys()


def test_whole_numbers_written_as_floats(main):
    same = main.ask("chelsea", WHAT, fsr_budget=32)
    assert main.ask("chelsea", WHAT, fsr_budget=32.0) == same
    assert main.ask("chelsea", WHAT, headers={"x-fsr-budget": "32.0"}) == same
    assert main.ask("chelsea", WHAT, headers={"x-fsr-budget": "32.0"}, fsr_budget=32) == same
    assert (
        main.ask("chelsea", WHAT, fsr_budget=32.0, mm_processor_kwargs={"fsr_budget": 32}) == same
    )
    with pytest.raises(openai.BadRequestError, match="one token or the whole image"):
        main.ask("chelsea", WHAT, fsr_budget=1.0)


def test_a_budget_header_that_comes_twice(main):
    def sent(*budgets):
        body = {"model": NAME, "messages": main.messages("chelsea", WHAT), "max_tokens": 1}
        headers = [
            ("authorization", f"Bearer {KEY}"),
            *(("x-fsr-budget", budget) for budget in budgets),
        ]
        return httpx.post(f"{main.url}/chat/completions", json=body, headers=headers, timeout=120)

    for budgets in (("32", "32"), ("32, 32",), ("32", "32.0"), ("[32]", "[32.0]")):
        assert sent(*budgets).headers["x-fsr-visual-tokens"] == "32/576"
    for budgets in (("32", "33"), ("32, off",), ("[32]", "32")):
        refused = sent(*budgets)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "x-fsr-budget"


def test_long_names_and_values_of_clients_are_cut(main):
    long = "fsr_" + "x" * 100_000
    body = {"model": NAME, "messages": main.messages("chelsea", WHAT), "max_tokens": 1}
    for fields in (
        {long: 1},
        {"fsr_method": long},
        {"fsr_options": {long: 1}},
        {"mm_processor_kwargs": {long: 1}},
    ):
        refused = main.post({**body, **fields})
        assert refused.status_code == 400
        assert len(refused.text) < 1500
        assert refused.json()["error"]["param"].startswith("fsr_")


# --- a server that leaves the plugin aside --------------------------------------------------------

OPTIONS = (
    "--fsr-ignore",
    "--fsr-budget",
    "64",
    "--fsr-max-budget",
    "32",
    "--fsr-method",
    "nope",
    "--fsr-adaptive",
    "1",
)


@pytest.fixture(scope="module")
def ignored(start, checkpoint):
    with start(
        "ignored", checkpoint, "--api-key", KEY, "--enable-prompt-tokens-details", *OPTIONS
    ) as running:
        yield running


def test_all_that_was_said_to_the_plugin_is_dropped_unjudged(ignored, main):
    plain = ignored.ask("chelsea", WHAT)
    assert plain == {
        **main.ask("chelsea", WHAT),
        "tokens": None,
    }  # no header of ours, and the answer of a whole image
    for fields in (
        {"fsr_budget": 64},
        {"fsr_budget": "nonsense", "fsr_method": 3, "fsr_bugdet": 1},
        {"mm_processor_kwargs": {"fsr_budget": "many", "fsr_method": "random"}},
        {"vllm_xargs": {"fsr_budget": 64}},
    ):
        assert ignored.ask("chelsea", WHAT, **fields) == plain
    for budget in ("64", "nonsense", "[[["):
        assert (
            ignored.ask("chelsea", WHAT, headers={"x-fsr-budget": budget}, fsr_budget=65) == plain
        )


def test_model_names_lose_their_suffix(ignored):
    whole = ignored.ask("chelsea", WHAT)["prompt"]
    for suffix in ("64", "0.25", "off", "nonsense", ""):
        body = {
            "model": f"{NAME}@fsr{suffix}",
            "messages": ignored.messages("chelsea", WHAT),
            "max_tokens": 1,
        }
        answer = ignored.post(body)
        assert answer.status_code == 200
        assert answer.json()["usage"]["prompt_tokens"] == whole
    assert ignored.post({**body, "model": "other@fsr64"}).status_code == 404


def test_other_endpoints_drop_them_too(ignored):
    messages = ignored.messages("chelsea", WHAT)
    whole = ignored.ask("chelsea", WHAT)["prompt"]
    counted = ignored.post({"model": NAME, "messages": messages, "fsr_budget": 1}, "/tokenize")
    assert counted.status_code == 200
    assert counted.json()["count"] == whole
    said = {
        "model": f"{NAME}@fsr64",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": "Hello"}],
    }
    assert ignored.post({**said, "fsr_budget": "many"}, "/v1/messages").status_code == 200
    text = {
        "model": NAME,
        "prompt": "Say",
        "max_tokens": 1,
        "fsr_budget": "many",
        "vllm_xargs": {"fsr_budget": 0},
    }
    assert ignored.post(text, "/v1/completions").status_code == 200


def test_vllms_own_judgement_stands(ignored):
    body = {"model": NAME, "messages": ignored.messages("chelsea", WHAT), "max_tokens": 1}
    mixed = ignored.post({**body, "mm_processor_kwargs": {"num_crops": 4, "fsr_budget": 64}})
    assert mixed.status_code == 400
    assert mixed.json()["error"]["param"] == "mm_processor_kwargs"


def test_the_server_says_that_it_ignores(ignored):
    assert ignored.get("/v1/fsr/config") == {
        "object": "fsr.config",
        "version": fsr_vllm.__version__,
        "ignored": True,
        "prunes": False,
    }
    log = ignored.log.read_text()
    assert log.count("left aside") == 1
    assert "is active for" not in log
    assert "Traceback" not in log
