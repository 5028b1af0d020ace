"""vLLM's own app of a render server, in this process, asked on several surfaces: what it parsed.

Run as a program, since the plugin changes vLLM's classes: MODEL PICTURE (a data URL). It prints
JSON: by surface, the status, the header, and how often fields were parsed and parts searched.
"""

import asyncio
import json
import os
import sys

os.environ["VLLM_PLUGINS"] = "fsr"

import httpx

from fsr_vllm.params import RequestFields, misplaced

NAME, WHAT = "fsr-demo", "What is this?"


def surfaces(picture):
    """A request with fields, and one without, on each surface that renders conversations."""
    image = {"type": "image_url", "image_url": {"url": picture}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": WHAT}]}]
    source = {"type": "base64", "media_type": "image/jpeg", "data": picture.split(",")[1]}
    part = {"type": "image", "source": source}
    anthropic = [{"role": "user", "content": [part, {"type": "text", "text": WHAT}]}]
    content = [
        {"type": "input_image", "image_url": picture, "detail": "auto"},
        {"type": "input_text", "text": WHAT},
    ]
    chat = {"model": NAME, "messages": messages, "max_tokens": 1}
    return {
        "chat": ("/v1/chat/completions/render", chat),
        "tokenize": ("/tokenize", chat),
        "messages": ("/v1/messages/render", {**chat, "messages": anthropic}),
        "responses": (
            "/v1/responses/render",
            {"model": NAME, "input": [{"role": "user", "content": content}]},
        ),
    }


def counted(function, counts, name):
    """The function, with its calls counted."""

    def call(*args, **kwargs):
        counts[name] += 1
        return function(*args, **kwargs)

    return call


async def application(model, *options):
    """The app of `vllm launch render MODEL --plugin fsr`, with its state."""
    from vllm import AsyncEngineArgs
    from vllm.config import VllmConfig
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.launchers.render.app_state import init_render_app_state
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(
        ["--model", model, "--served-model-name", NAME, "--plugin", "fsr", *options]
    )
    engine_args = AsyncEngineArgs.from_cli_args(args)
    config = VllmConfig(model_config=engine_args.create_model_config())
    app = build_app(args, ("render",))
    await init_render_app_state(config, app.state, args)
    return app


async def main(model, picture):
    """The counts of all surfaces."""
    app = await application(model, "--fsr-model-alias", "--no-enable-prefix-caching")
    counts = dict.fromkeys(("parses", "searches"), 0)
    RequestFields.parse = counted(RequestFields.parse, counts, "parses")
    misplaced._in_parts = counted(misplaced._in_parts, counts, "searches")
    found = {}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        for surface, (path, body) in surfaces(picture).items():
            for said, fields, headers in (
                ("body", {"fsr_budget": 64}, {}),
                ("header", {}, {"x-fsr-budget": "64"}),
                ("name", {"model": f"{NAME}@fsr64"}, {}),
                ("nothing", {}, {}),
            ):
                counts.update(parses=0, searches=0)
                answer = await client.post(path, json={**body, **fields}, headers=headers)
                tokens = answer.headers.get("x-fsr-visual-tokens")
                found[f"{surface}: {said}"] = [answer.status_code, tokens, *counts.values()]
        schema = (await client.get("/openapi.json")).json()
    found["openapi"] = schema
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
