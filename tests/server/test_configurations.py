"""Other servers: bounds and defaults behind two API servers, an inactive plugin, models that cannot
be pruned.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from fsr_vllm.demo import ENVIRONMENT

from . import test_uuids
from .conftest import NAME, embedded

pytestmark = pytest.mark.engine

WHAT = "What is this?"


def refused(server, field, *parts, **fields):
    with pytest.raises(openai.BadRequestError) as error:
        server.ask(*(parts or ("chelsea", WHAT)), **fields)
    assert error.value.body["param"] == field
    return error.value.body["message"]


def test_bounds_default_and_details_behind_two_api_servers(start, checkpoint, adapter):
    options = (
        "--fsr-min-budget",
        "16",
        "--fsr-max-budget",
        "128",
        "--fsr-detail-budgets",
        '{"low": 32, "high": 0.2, "original": 48}',
    )
    options += (
        "--fsr-model-alias",
        "--enable-lora",
        "--lora-modules",
        f"adapter={adapter}",
        "--enable-mm-embeds",
    )
    with start("bounds", checkpoint, "--api-server-count", "2", *options) as server:
        for _ in range(4):  # both servers get some
            assert server.ask("chelsea", WHAT)["tokens"] == "128/576"
            assert server.ask("chelsea", WHAT, fsr_budget=16)["tokens"] == "16/576"
            for budget in (15, 129, 1000, "off", 0.5, 0.01):
                message = refused(server, "fsr_budget", fsr_budget=budget)
                asked = {
                    "off": '"off" of 576 = 576',
                    0.5: "0.5 of 576 = 288",
                    0.01: "0.01 of 576 = 6",
                }.get(budget, budget)
                side = "minimum 16" if budget in (15, 0.01) else "maximum 128"
                assert f"fsr_budget {asked}, " in message
                assert f"this server's {side} (allowed: 16 to 128)" in message
            message = refused(server, "x-fsr-budget", headers={"x-fsr-budget": "0.5"})
            assert "x-fsr-budget 0.5 of 576 = 288, above this server's maximum 128" in message
        messages = server.messages("chelsea", WHAT)
        for detail, kept in (("low", 32), ("high", 115), ("auto", 128), ("original", 48)):
            messages[0]["content"][0]["image_url"]["detail"] = detail
            raw = server.client.chat.completions.with_raw_response.create(
                model=NAME, messages=messages, max_tokens=1
            )
            assert raw.headers["x-fsr-visual-tokens"] == f"{kept}/576"
            override = server.client.chat.completions.with_raw_response.create(
                model=NAME, messages=messages, max_tokens=1, extra_body={"fsr_budget": 20}
            )
            assert override.headers["x-fsr-visual-tokens"] == "20/576"
        for budget in range(
            20, 28
        ):  # a connection each, so that both servers come to see the image
            body = {
                "model": NAME,
                "messages": server.messages("chelsea", WHAT),
                "max_tokens": 1,
                "fsr_budget": budget,
            }
            assert server.post(body).status_code == 200
        stats = [server.get("/v1/fsr/stats") for _ in range(8)]
        assert any(each["images"] > 1 for each in stats)
        for each in stats:
            assert each["preprocessed_images"] == bool(
                each["images"]
            )  # once by each server that was asked
            (worker,) = each["workers"]
            assert worker["tower_images"] == 1 < worker["images"]
        config = server.get("/v1/fsr/config")
        assert (config["min_budget"], config["max_budget"], config["default_budget"]) == (
            16,
            128,
            128,
        )
        assert config["default_tokens"] == 128
        assert config["detail_budgets"] == {
            "low": 32,
            "high": 0.2,
            "original": 48,
        }
        details_belong_to_images_and_come_last(server)
        adapters_have_budgets_behind_their_names(server)
        embeddings_know_no_default_but_the_maximum(server)
        assert "Traceback" not in server.log.read_text()


def answered(server, messages, model=NAME, headers=None, **fields):
    raw = server.client.chat.completions.with_raw_response.create(
        model=model,
        messages=messages,
        max_tokens=4,
        temperature=0,
        extra_body=fields,
        extra_headers=headers,
    )
    return raw.headers["x-fsr-visual-tokens"], raw.parse()


def details_belong_to_images_and_come_last(server):
    messages = server.messages("chelsea", "rocket", WHAT)
    for part, detail in zip(messages[0]["content"], ("high", "low"), strict=False):
        part["image_url"]["detail"] = detail
    assert answered(server, messages)[0] == "147/1152"  # 115 and 32
    del messages[0]["content"][0]["image_url"]["detail"]
    assert (
        answered(server, messages)[0] == "160/1152"
    )  # no detail is auto, and auto has no budget: the default's 128
    assert answered(server, messages, model=f"{NAME}@fsr20")[0] == "40/1152"
    assert (
        answered(server, messages, model=f"{NAME}@fsr20", headers={"x-fsr-budget": "30"})[0]
        == "60/1152"
    )
    assert answered(server, messages, model=f"{NAME}@fsr20", fsr_budget=[16, 17])[0] == "33/1152"
    for suffix in ("15", "129", "off"):
        with pytest.raises(openai.BadRequestError) as error:
            answered(server, messages, model=f"{NAME}@fsr{suffix}")
        assert error.value.body["param"] == "model"


def adapters_have_budgets_behind_their_names(server):
    messages = server.messages("chelsea", WHAT)
    plain, named = (
        answered(server, messages, fsr_budget=64),
        answered(server, messages, model="adapter@fsr64"),
    )
    given = answered(server, messages, model="adapter", fsr_budget=64)
    assert named[0] == plain[0] == "64/576"
    assert named[1].model == "adapter"
    assert named[1].choices[0].message.content == given[1].choices[0].message.content
    assert named[1].choices[0].message.content != plain[1].choices[0].message.content
    with pytest.raises(openai.NotFoundError):
        answered(server, messages, model="other@fsr64")


def embeddings_know_no_default_but_the_maximum(server):
    for path in ("/v1/chat/completions", "/tokenize"):
        assert (
            server.post(embedded(server, [100]), path).headers["x-fsr-visual-tokens"] == "100/100"
        )
        assert (
            server.post(embedded(server, [128] * 2), path).headers["x-fsr-visual-tokens"]
            == "256/256"
        )
        for fields in ({}, {"fsr_method": "random"}):
            refused = server.post(embedded(server, [129, 129], **fields), path)
            error = refused.json()["error"]
            assert refused.status_code == 400
            assert error["param"] == "image_embeds"
            assert "129 rows" in error["message"]
            assert "128" in error["message"]
            assert "fsr_" not in error["message"]
        asked = server.post(embedded(server, [100], fsr_budget=64), path)
        assert asked.status_code == 400
        assert asked.json()["error"]["param"] == "fsr_budget"


def test_inactive_plugin_refuses_fields_and_is_otherwise_absent(start, checkpoint):
    with start("inactive", checkpoint, plugin=False) as server:
        plain = server.ask("chelsea", WHAT)
        assert plain["tokens"] is None
        for fields in (
            {"fsr_budget": 64},
            {"fsr_method": "fsr"},
            {"mm_processor_kwargs": {"fsr_budget": 64}},
        ):
            message = refused(
                server, "fsr_method" if "fsr_method" in fields else "fsr_budget", **fields
            )
            assert "--plugin fsr" in message
        for name, fields in (
            ("fsrBudget", {"fsrBudget": 64}),
            ("extra_body.fsr_budget", {"extra_body": {"fsr_budget": 64}}),
            ("metadata.fsr_method", {"metadata": {"fsr_method": "fsr"}}),
        ):
            assert "--plugin fsr" in refused(server, name, **fields)
        anthropic = {
            "model": NAME,
            "max_tokens": 2,
            "messages": [{"role": "user", "content": WHAT}],
        }
        assert server.post(anthropic, "/v1/messages").status_code == 200
        for fields in (
            {"fsr_budget": 64},
            {"metadata": {"fsr_budget": 64}},
            {"vllm_xargs": {"fsr_budget": 64}},
        ):
            answer = server.post({**anthropic, **fields}, "/v1/messages")
            assert answer.status_code == 400
            assert "--plugin fsr" in answer.json()["error"]["message"]
        assert server.ask("chelsea", WHAT, fsrBudget=None, metadata={"note": "fsr"}) == plain
        test_uuids.check(server)  # so vLLM does without the plugin


def test_text_model_names_its_architecture(start, tmp_path):
    from benchmarks.testbed import build_text_model

    options = ("--limit-mm-per-prompt", "{}", "--fsr-model-alias")
    with start("text", build_text_model(tmp_path / "text"), *options) as server:
        assert server.ask(WHAT)["tokens"] is None
        assert "LlamaForCausalLM" in refused(server, "fsr_budget", WHAT, fsr_budget=64)
        with pytest.raises(openai.BadRequestError, match="LlamaForCausalLM") as error:
            server.client.completions.create(model=f"{NAME}@fsr64", prompt=WHAT)
        assert error.value.body["param"] == "model"


def test_llava_without_clip_names_its_tower(start, tmp_path):
    from benchmarks.testbed import build_clip_less

    with start("siglip", build_clip_less(tmp_path / "siglip")) as server:
        plain = server.ask("chelsea", WHAT)
        assert plain["tokens"] is None
        assert "siglip" in refused(server, "fsr_budget", fsr_budget=64)
        assert server.ask("chelsea", WHAT) == plain


# Starts that must fail, each with the words a user needs to see.
REFUSED_STARTS = {
    "unknown plugin": (("--plugin", "nosuch"), {}, ["nosuch", "installed: fsr"]),
    "grpc": (("--plugin", "fsr", "--grpc"), {}, ["--grpc", "fsr"]),
    "rust": (("--plugin", "fsr"), {"VLLM_USE_RUST_FRONTEND": "1"}, ["Rust", "fsr"]),
    "option without plugin": (("--fsr-budget", "64"), {}, ["--fsr-budget", "--plugin fsr"]),
    "bad budget": (("--plugin", "fsr", "--fsr-budget", "1.5"), {}, ["--fsr-budget", "off"]),
    "adaptive without bounds": (
        ("--plugin", "fsr", "--fsr-adaptive"),
        {},
        ["--fsr-adaptive", "LOW:HIGH", "bounds"],
    ),
    "adaptive over maximum": (
        ("--plugin", "fsr", "--fsr-adaptive", "64:288", "--fsr-max-budget", "100"),
        {},
        ["error: --fsr-adaptive 288, above --fsr-max-budget 100"],
    ),
    "budget over maximum": (
        ("--plugin", "fsr", "--fsr-budget", "200", "--fsr-max-budget", "100"),
        {},
        ["error: --fsr-budget 200, above --fsr-max-budget 100"],
    ),
    "default share over maximum": (
        ("--plugin", "fsr", "--fsr-budget", "0.5", "--fsr-max-budget", "100"),
        {},
        ["fsr.budget 0.5 of 576 = 288, above fsr.max_budget 100"],
    ),
    "default method without its input": (
        ("--plugin", "fsr", "--fsr-method", "cdpruner", "--fsr-text-encoder", "none"),
        {},
        ["defaults would fail", "relevance"],
    ),
    "unknown method": (
        ("--plugin", "fsr", "--fsr-method", "nope"),
        {},
        ["error: argument --fsr-method: must be one of fsr", "random"],
    ),
    "no text encoder": (
        ("--plugin", "fsr", "--fsr-text-encoder", "nowhere/at-all"),
        {},
        ["nowhere/at-all", "--fsr-text-encoder llm", "--fsr-text-encoder none"],
    ),
    "unknown setting": (
        ("--plugin", "fsr", "--additional-config", '{"fsr": {"bugdet": 3}}'),
        {},
        ["bugdet", "max_budget"],
    ),
}


@pytest.fixture(scope="module")
def refused_starts(checkpoint):
    """What each of these starts printed before it gave up; two run at a time."""

    def start(name):
        options, environment, _ = REFUSED_STARTS[name]
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            str(checkpoint),
            *options,
        ]
        environment = {**os.environ, **ENVIRONMENT, **environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)

    with ThreadPoolExecutor(2) as pool:
        yield dict(zip(REFUSED_STARTS, pool.map(start, REFUSED_STARTS), strict=True))


@pytest.mark.parametrize("name", REFUSED_STARTS)
def test_start_is_refused(refused_starts, name):
    done = refused_starts[name]
    output = done.stdout + done.stderr
    assert done.returncode != 0
    for word in REFUSED_STARTS[name][2]:
        assert word in output, output[-2000:]


@pytest.mark.full
def test_two_data_parallel_engines_answer_as_one(main, start, checkpoint):
    asked = [
        (name, budget)
        for name in ("chelsea", "rocket", "coffee")
        for budget in ("off", 64, 16, 0.25)
    ] * 2
    # vLLM's workers bind to cores by rank within an engine: without this the two engines share
    # them.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with start(
        "data parallel", checkpoint, "--data-parallel-size", "2", environment=environment
    ) as server:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda one: server.ask(one[0], WHAT, fsr_budget=one[1]), asked))
        (refused_budget,) = {refused(server, "fsr_budget", fsr_budget=0) for _ in range(4)}
        workers = server.get("/v1/fsr/stats")["workers"]
        assert "Traceback" not in server.log.read_text()
    assert found == [main.ask(name, WHAT, fsr_budget=budget) for name, budget in asked]
    assert "1 to" in refused_budget
    assert len(workers) == 2
    assert all(0 < worker["tower_images"] <= 3 < worker["images"] for worker in workers)
