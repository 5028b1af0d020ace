"""Other ways to start: a pooling server, `vllm run-batch`, and vLLM's gRPC server, which must
refuse.
"""

import json
import os
import subprocess
import sys

import pytest

from fsr_vllm.demo import ENVIRONMENT, SERVE_OPTIONS

from .conftest import NAME

pytestmark = pytest.mark.engine

WHAT = "What is this?"
TOKENS = "x-fsr-visual-tokens"


def test_pooling_endpoints(start, checkpoint):
    options = ("--runner", "pooling", "--fsr-model-alias", "--fsr-detail-budgets", '{"low": 16}')
    with start("pooling", checkpoint, *options) as server:
        chat = {"model": NAME, "messages": server.messages("chelsea", WHAT)}
        low = json.loads(json.dumps(chat))
        low["messages"][0]["content"][0]["image_url"]["detail"] = "low"
        whole = server.post(chat, "/v1/embeddings")
        assert whole.headers[TOKENS] == "576/576"
        text = whole.json()["usage"]["prompt_tokens"] - 576
        for path in ("/v1/embeddings", "/pooling"):
            for kept, body, headers in (
                (64, {**chat, "fsr_budget": 64}, {}),
                (64, {**chat, "mm_processor_kwargs": {"fsr_budget": 64}}, {}),
                (65, chat, {"x-fsr-budget": "65"}),
                (144, {**chat, "model": f"{NAME}@fsr0.25"}, {}),
                (16, low, {}),
            ):
                answer = server.post(body, path, headers=headers)
                assert answer.headers[TOKENS] == f"{kept}/576"
                assert answer.json()["usage"]["prompt_tokens"] == text + kept
        vectors = [
            tuple(
                server.post({**chat, "fsr_budget": 16, **fields}, "/v1/embeddings").json()["data"][
                    0
                ]["embedding"]
            )
            for fields in (
                {},
                {"fsr_question": WHAT},
                {"fsr_question": "a red flag"},
                {"fsr_budget": 17},
            )
        ]
        assert vectors[0] == pytest.approx(
            vectors[1], abs=1e-5
        )  # the question came from the message
        assert vectors[0] != pytest.approx(vectors[2], abs=1e-5)
        assert vectors[0] != pytest.approx(vectors[3], abs=1e-5)
        cohere = {"model": NAME, "images": [server.pictures["chelsea"], server.pictures["rocket"]]}
        cohere["embedding_types"] = ["float"]
        assert server.post({**cohere, "fsr_budget": 10}, "/v2/embed").headers[TOKENS] == "20/1152"
        in_metadata = {"metadata": {"fsr_budget": 64}}
        wrong = [
            ("/v1/embeddings", "fsr_budget", {**chat, "fsr_budget": 0}),
            ("/v1/embeddings", "fsr_budget", {**chat, "fsr_budget": [1, 2]}),
            (
                "/v1/embeddings",
                "fsr_budget",
                {"model": NAME, "input": "text", "fsr_budget": "many"},
            ),
            (
                "/v1/embeddings",
                "mm_processor_kwargs",
                {**chat, "mm_processor_kwargs": {"num_crops": 4}},
            ),
            ("/v1/embeddings", "model", {**chat, "model": f"{NAME}@fsr0"}),
            ("/v2/embed", "fsr_method", {**cohere, "fsr_method": "nope"}),
            ("/v1/embeddings", "fsrBudget", {**chat, "fsrBudget": 64}),
            ("/pooling", "extra_body.fsr_budget", {**chat, "extra_body": {"fsr_budget": 64}}),
            ("/v2/embed", "fsr-budget", {**cohere, "fsr-budget": 10}),
            ("/v2/embed", "fsr_budget", {**cohere, "mm_processor_kwargs": {"fsr_budget": "many"}}),
            (
                "/v2/embed",
                "fsr_budget",
                {
                    **cohere,
                    "mm_processor_kwargs": {"fsr_budget": 5},
                    "vllm_xargs": {"fsr_budget": 6},
                },
            ),
            (
                "/v2/embed",
                "inputs[0].content[0].fsr_budget",
                {**cohere, **in_part(cohere["images"][0])},
            ),
            (
                "/score",
                "metadata.fsr_budget",
                {"model": NAME, "queries": "a", "documents": "b", **in_metadata},
            ),
            (
                "/score",
                "fsr_budget",
                {"model": NAME, "queries": "a", "documents": "b", "fsr_budget": 64},
            ),
            ("/rerank", "model", {"model": f"{NAME}@fsr64", "query": "a", "documents": ["b"]}),
        ]
        for path, field, body in wrong:
            refused = server.post(body, path)
            assert refused.status_code == 400, refused.text[:500]
            assert refused.json()["error"]["param"] == field
        assert server.post({**chat, "model": "nope@fsr64"}, "/v1/embeddings").status_code == 404
        assert server.post(chat, "/v1/embeddings").json()["usage"]["prompt_tokens"] == text + 576
        assert "Traceback" not in server.log.read_text()


def in_part(picture):
    """Cohere's other way to give an image, with a budget where none is read."""
    part = {"type": "image_url", "image_url": {"url": picture}, "fsr_budget": 10}
    return {"images": None, "inputs": [{"content": [part]}]}


@pytest.mark.full
def test_run_batch(checkpoint, pictures, tmp_path):
    image = {"type": "image_url", "image_url": {"url": pictures["chelsea"]}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": WHAT}]}]
    rows = [
        (576, {}),
        (64, {"fsr_budget": 64}),
        (65, {"model": f"{NAME}@fsr65"}),
        (66, {"vllm_xargs": {"fsr_budget": 66}}),
        ("fsr_budget", {"fsr_budget": "many"}),
        ("model", {"model": f"{NAME}@fsr0"}),
        ("extra_body.fsr_budget", {"extra_body": {"fsr_budget": 64}}),
        ("metadata.fsr_budget", {"metadata": {"fsr_budget": 64}}),
    ]
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions"}
        | {"body": {"model": NAME, "messages": messages, "max_tokens": 2, **fields}}
        for i, (_, fields) in enumerate(rows)
    ]
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("\n".join(map(json.dumps, lines)))
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "run-batch",
        "-i",
        str(given),
        "-o",
        str(out),
    ]
    command += ["--model", str(checkpoint), *SERVE_OPTIONS, "--fsr-model-alias"]
    done = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answers = {row["custom_id"]: row for row in map(json.loads, out.read_text().splitlines())}
    whole = answers["0"]["response"]["body"]["usage"]["prompt_tokens"]
    for i, (expected, _) in enumerate(rows):
        answer = answers[str(i)]
        if isinstance(expected, int):
            assert answer["response"]["body"]["usage"]["prompt_tokens"] == whole - 576 + expected
        else:
            assert answer["response"]["status_code"] == 400
            assert answer["error"]["error"]["param"] == expected


# What vLLM's gRPC server imports before it reads its options; nothing of it is reached.
STAND_INS = {
    "grpc": "",
    "grpc_health/v1/health_pb2_grpc": "",
    "grpc_reflection/v1alpha/reflection": "",
    "smg_grpc_proto/vllm_engine_pb2": "",
    "smg_grpc_proto/vllm_engine_pb2_grpc": "",
    "smg_grpc_servicer/vllm/health_servicer": "VllmHealthServicer = None",
    "smg_grpc_servicer/vllm/servicer": "VllmEngineServicer = None",
}


def test_the_grpc_server_of_its_own_refuses_the_plugin(tmp_path):
    for name, text in STAND_INS.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.launchers.grpc_server",
        "--model",
        "any",
        "--plugin",
        "fsr",
    ]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "gRPC server" in done.stderr
    assert "plugin fsr cannot work" in done.stderr
