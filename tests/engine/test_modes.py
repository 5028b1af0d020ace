"""Modes of vLLM with the plugin active: exact counts, the plain engine's answers, and an engine
that goes on.

One engine serves everything a request can ask for; every other mode starts one of its own (`full`).
Modes that vLLM refuses on a CPU are tests too: they are to be refused with vLLM's words, and run
where they can. See docs/modes.md.
"""

import json
import os
import re
from importlib.util import find_spec

import pytest
import torch

from benchmarks.testbed import build_adapter

from .mode_files import Files, check, counts, same
from .modes import ASKED, VISUAL
from .quantised import quantise

pytestmark = pytest.mark.engine

TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
FRESH_KV = {"reset_prefix_cache": {}}


def kv(connector, **extra):
    return {"kv_connector": connector, "kv_role": "kv_both", "kv_connector_extra_config": extra}


def ec(role, folder):
    extra = {"shared_storage_path": str(folder)}
    return {
        "ec_connector": "ECExampleConnector",
        "ec_role": role,
        "ec_connector_extra_config": extra,
    }


# Arguments of the engine, environment, calls between two rounds of requests, and what the log must
# say.
MODES = {
    # Eager, with a given size of KV cache, vLLM's CPU worker skips the warm-up that makes the
    # second stage's buffers (AssertionError about intermediate_tensors at the first request,
    # without the plugin too).
    "pipeline parallel": (
        {"pipeline_parallel_size": 2, "enforce_eager": False},
        TWO_CORES,
        {},
        "Worker_PP1",
    ),
    "encoder data parallel": (
        {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"},
        TWO_CORES,
        {},
        "Falling back to `--mm-encoder-tp-mode weights`",
    ),
    "ngram": ({"speculative_config": NGRAM}, {}, {}, "method='ngram'"),
    "async scheduling": ({"async_scheduling": True}, {}, {}, ""),
    "no async scheduling": ({"async_scheduling": False}, {}, {}, ""),
    "model runner V1": ({}, {"VLLM_USE_V2_MODEL_RUNNER": "0"}, {}, ""),
    "compiled": ({"enforce_eager": False}, {}, {}, "Warming up model for the compilation"),
    "encoder graphs and compiled encoder": (
        {
            "enforce_eager": False,
            "compilation_config": {
                "mode": 0,
                "cudagraph_mm_encoder": True,
                "compile_mm_encoder": True,
            },
        },
        {},
        {},
        "'cudagraph_mm_encoder': True",
    ),
}
NO_GPU = not torch.cuda.is_available()
# Refused here: arguments, environment, the words, and whether this machine is one that refuses.
REFUSED = {
    "tower LoRA": (
        {"enable_lora": True, "enable_tower_connector_lora": True},
        {},
        "plugin fsr: --enable-tower-connector-lora",
        True,
    ),
    "data parallel offline": (
        {"data_parallel_size": 2},
        {},
        "LLM(data_parallel_size=2) is not supported",
        True,
    ),
    "model runner V2": (
        {},
        {"VLLM_USE_V2_MODEL_RUNNER": "1"},
        "Model Runner V2 requires Triton",
        NO_GPU,
    ),
    "sleep mode": (
        {"enable_sleep_mode": True},
        {},
        "Sleep mode is not supported on current platform",
        NO_GPU,
    ),
    "ray": (
        {"distributed_executor_backend": "ray"},
        {},
        "Failed to import Ray",
        find_spec("ray") is None,
    ),
    "KV offload to CPU": (
        {"kv_transfer_config": kv("OffloadingConnector", cpu_bytes_to_use=1 << 26)},
        {},
        "CPU Offloading is currently only supported on CUDA-alike and XPU GPUs",
        NO_GPU,
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("modes"))


@pytest.fixture(scope="module")
def plain(files):
    return files.run("plain", {}, requests=True)


def test_plain(plain):
    check(plain, plain)
    logprobs = {tuple(answer["logprobs"][0]) for answer in plain["together"]}
    assert len(logprobs) == len(ASKED), "answers that do not differ would show nothing"


def test_structured_output(plain):
    found = plain["structured"]
    for way in ("choice", "json", "regex"):
        assert counts(found[way]) == VISUAL
    assert all(answer["texts"][0] in ("left", "right") for answer in found["choice"])
    assert all(isinstance(json.loads(answer["texts"][0])["red"], bool) for answer in found["json"])
    assert all(re.fullmatch("[0-9]{3}", answer["texts"][0]) for answer in found["regex"])


def test_logprobs(plain):
    same(plain["logprobs"], plain["together"])
    assert all(number >= 5 for answer in plain["logprobs"] for number in answer["ranked"][0])


def test_prompt_logprobs(plain):
    same(plain["prompt_logprobs"], plain["together"])
    for answer in plain["prompt_logprobs"]:
        first, *rest = answer["prompt_logprobs"]
        assert (
            first is None
            and len(rest) == answer["prompt"] - 1
            and all(-20 < value <= 0 for value in rest)
        )
    for later, answer in zip(plain["continued"], plain["together"], strict=True):
        # The answer read back as a prompt: the same rows, seen in one prefill, give the logprobs of
        # decoding.
        assert later["placeholders"] == answer["placeholders"]
        assert later["of_answer"] == pytest.approx(answer["logprobs"][0], abs=1e-4)


def test_several_answers(plain):
    found = plain["several"]
    assert counts(found) == VISUAL and all(len(answer["tokens"]) == 3 for answer in found)
    assert any(len({tuple(tokens) for tokens in answer["tokens"]}) == 3 for answer in found)


def test_beam_search(plain):
    for beams, answer, visual in zip(plain["beams"], plain["together"], VISUAL, strict=True):
        scores = [score for _, score, _ in beams]
        assert len(beams) == 3 and scores == sorted(scores, reverse=True)
        assert all(placeholders == visual for _, _, placeholders in beams)
        assert (
            scores[0] >= sum(answer["logprobs"][0][:4]) - 1e-4
        )  # greedy is one of the ways it looked at


def test_tools(plain):
    without, with_tools = plain["tools"][:3], plain["tools"][3:]
    assert counts(without) == counts(with_tools) == [64, 8, 24]
    more = {
        tools["prompt"] - none["prompt"] for none, tools in zip(without, with_tools, strict=True)
    }
    assert len(more) == 1 and more.pop() > 20  # the tool's text, the same at every budget
    assert all(
        none["tokens"] != tools["tokens"] for none, tools in zip(without, with_tools, strict=True)
    )


# Modes of the engine
# ----------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("name", MODES)
def test_mode(files, plain, name):
    llm, environment, between, said = MODES[name]
    result, log = files.start(name, llm, environment, between=between)
    assert result is not None, log[-4000:]
    assert said in log
    check(result, plain)


@pytest.mark.full
def test_adapter_of_the_language_model(files, plain):
    lora = build_adapter(files.folder / "adapter", files.model)
    result = files.run("lora", {"enable_lora": True, "max_lora_rank": 8}, lora=str(lora))
    check(result, plain)
    assert counts(result["adapter"]) == VISUAL
    for adapted, base in zip(result["adapter"], result["together"], strict=True):
        assert adapted["logprobs"] != base["logprobs"]


@pytest.mark.full
def test_quantised(files, plain):
    """int8 has other answers than float32; they are to be near, and the same however they are asked
    for.
    """
    model = quantise(files.model, files.folder / "int8")
    # In bfloat16: the kernel that CPUs with AMX take reads nothing wider.
    result = files.run("quantised", {"model": str(model), "dtype": "bfloat16"})
    check(result, result)
    near = [
        answer["logprobs"][0][0] == pytest.approx(full["logprobs"][0][0], abs=0.5)
        for answer, full in zip(result["together"], plain["together"], strict=True)
        if answer["tokens"][0][0] == full["tokens"][0][0]
    ]
    assert len(near) > len(ASKED) / 2 and all(near)
    assert result["together"][0]["logprobs"] != plain["together"][0]["logprobs"]


@pytest.mark.full
def test_encoder_outputs_travel_between_engines(files, plain):
    """The first engine encodes and stores; the second one runs no tower at all and has the same
    answers.
    """
    folder = files.folder / "encoded"
    first = files.run("ec both", {"ec_transfer_config": ec("ec_both", folder)})
    check(first, plain)
    second = files.run("ec consumer", {"ec_transfer_config": ec("ec_consumer", folder)})
    check(second, plain)
    assert first["stats"]["workers"][0]["images"] == len(list(folder.iterdir())) == 6
    assert second["stats"]["workers"][0].get("tower_images", 0) == 0


@pytest.mark.full
def test_kv_blocks_come_back_from_a_connector(files, plain):
    """vLLM's ExampleConnector keeps KV blocks in files named by tokens and image identities."""
    connector = kv("ExampleConnector", shared_storage_path=str(files.folder / "kv"))
    result = files.run("kv", {"kv_transfer_config": connector}, between=FRESH_KV)
    check(result, plain)
    assert (
        any((files.folder / "kv").iterdir())
        and sum(answer["cached"] for answer in result["alone"]) > 0
    )


@pytest.mark.full
@pytest.mark.parametrize("name", REFUSED)
def test_mode_is_refused_or_runs(files, plain, name):
    llm, environment, words, refuses = REFUSED[name]
    result, log = files.start(name, llm, environment)
    if refuses:
        assert result is None and words in log, log[-4000:]
    else:
        assert result is not None, log[-4000:]
        check(result, plain)
