"""Real servers for the tests of this folder: one per configuration, when first asked for."""

import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI

from benchmarks.testbed import build_adapter
from fsr_vllm.demo import ENVIRONMENT, SERVE_OPTIONS, serve
from fsr_vllm.server.report import current_report

WITHOUT_PLUGIN = SERVE_OPTIONS[2:]
KEY = "secret"
NAME = "fsr-demo"
ORIGIN = "http://page.example"


class Server:
    """A running server and the ways the tests talk to it."""

    def __init__(self, url: str, log: Path, pictures: dict[str, str], width: int) -> None:
        self.url, self.log, self.pictures = url, log, pictures
        self.width = width  # of an embedding
        self.client = OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120)

    def messages(self, *parts: str) -> list[dict[str, Any]]:
        """One user message; parts that name a photograph are images, the others text."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": self.pictures[part]}}
            if part in self.pictures
            else {"type": "text", "text": part}
            for part in parts
        ]
        return [{"role": "user", "content": content}]

    def ask(
        self, *parts: str, headers: dict[str, str] | None = None, **fields: Any
    ) -> dict[str, Any]:
        """A chat completion by the OpenAI SDK: text, prompt tokens and the kept/total header."""
        raw = self.client.chat.completions.with_raw_response.create(
            model=NAME,
            messages=self.messages(*parts),
            max_tokens=8,
            temperature=0,
            extra_body=fields,
            extra_headers=headers,
        )
        answer = raw.parse()
        return {
            "text": answer.choices[0].message.content,
            "prompt": answer.usage.prompt_tokens,
            "tokens": raw.headers.get("x-fsr-visual-tokens"),
        }

    def post(self, body: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        """A raw POST; the body may be anything."""
        headers = {
            "authorization": f"Bearer {KEY}",
            "content-type": "application/json",
            **options.pop("headers", {}),
        }
        content = body if isinstance(body, (str, bytes)) else json.dumps(body)
        url = self.url.removesuffix("/v1") + path
        return httpx.post(url, content=content, headers=headers, timeout=120, **options)

    def get(self, path: str) -> Any:
        """A GET of one of our routes, over a connection of its own."""
        root = self.url.removesuffix("/v1")
        return (
            httpx.get(root + path, headers={"authorization": f"Bearer {KEY}"}, timeout=120)
            .raise_for_status()
            .json()
        )


def embedded(server: Server, rows: list[int], **fields: Any) -> dict[str, Any]:
    """A chat request whose images are embeddings of so many rows each."""
    content: list[dict[str, Any]] = []
    for count in rows:
        data = io.BytesIO()
        torch.save(torch.randn(count, server.width), data)
        content.append(
            {"type": "image_embeds", "image_embeds": base64.b64encode(data.getvalue()).decode()}
        )
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What is this?"}]}]
    return {"model": NAME, "messages": messages, "max_tokens": 2, **fields}


@pytest.fixture(scope="package")
def start(tmp_path_factory, pictures):
    """A context manager that serves a checkpoint with the given options."""
    folder = tmp_path_factory.mktemp("servers")

    @contextlib.contextmanager
    def started(
        name: str,
        model: Path,
        *options: str,
        plugin: bool = True,
        environment: dict[str, str] | None = None,
    ):
        log = folder / f"{name}.log"
        base = SERVE_OPTIONS if plugin else WITHOUT_PLUGIN
        with serve(
            str(model), log, (*base, *options), {**ENVIRONMENT, **(environment or {})}
        ) as url:
            config = json.loads((model / "config.json").read_text())
            yield Server(url, log, pictures, config.get("text_config", config)["hidden_size"])

    return started


@pytest.fixture(scope="package")
def main(start, checkpoint):
    """The server that most tests share: an API key, and everything that changes nothing until a
    request uses it.
    """
    options = (
        "--api-key",
        KEY,
        "--fsr-model-alias",
        "--enable-prompt-tokens-details",
        "--enable-scale-out",
    )
    options += ("--enable-mm-embeds", "--allowed-origins", f'["{ORIGIN}"]')
    with start("main", checkpoint, *options) as running:
        yield running


@pytest.fixture(scope="session")
def adapter(checkpoint, tmp_path_factory):
    """A LoRA adapter of the language model, with random weights."""
    return build_adapter(tmp_path_factory.mktemp("adapter"), checkpoint, rank=4)


@pytest.fixture(scope="package")
def unpruned(main):
    """What the main server answers about a photograph whose tokens are all kept."""
    return main.ask("chelsea", "What is this?")


@pytest.fixture
def own_report():
    """Tests are one task to Python: none sees what another was asked."""
    token = current_report.set(None)
    yield
    current_report.reset(token)
