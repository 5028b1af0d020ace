"""One parse and one search per HTTP request, counted in vLLM's own app with the real renderer."""

import json
import os
import subprocess
import sys

import pytest

from fsr_vllm.demo import ENVIRONMENT

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def counted(checkpoint, pictures):
    """What `tests.server.counting` prints."""
    command = [sys.executable, "-m", "tests.server.counting", str(checkpoint), pictures["chelsea"]]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("surface", ["chat", "tokenize", "messages", "responses"])
def test_a_request_is_parsed_once_and_searched_once(counted, surface):
    for said in ("body", "header", "name"):
        assert counted[f"{surface}: {said}"] == [200, "64/576", 1, 1], said
    assert counted[f"{surface}: nothing"] == [200, "576/576", 0, 1]


def test_the_schema_shows_our_fields_where_images_come_in(counted):
    schema = counted["openapi"]
    for path in ("/v1/chat/completions/render", "/v1/messages/render", "/tokenize"):
        post = schema["paths"][path]["post"]
        assert "x-fsr-budget" in [each["name"] for each in post["parameters"]]
        body = post["requestBody"]["content"]["application/json"]["schema"]
        refs = [body, *body.get("anyOf", [])]
        models = [each["$ref"].rpartition("/")[2] for each in refs if "$ref" in each]
        assert models
        for name in models:
            properties = schema["components"]["schemas"][name]["properties"]
            assert "description" in properties["fsr_budget"]
            assert {"fsr_method", "fsr_options", "fsr_question"} <= properties.keys()
