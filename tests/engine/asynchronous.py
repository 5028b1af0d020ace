"""Run in a process of its own: one AsyncLLM, as programs that embed vLLM use it, given prompts as
plain dicts.

Usage: python asynchronous.py MODEL OUT. Many small pictures at a budget of 1 come first, all at
once, then single prompts; OUT gets what each output says of its visual tokens, and the tower's work
by engine step.
"""

import asyncio
import json
import sys
from pathlib import Path

from PIL import Image

import fsr_vllm

REQUESTS, IMAGES = 30, 5
RESERVED = f"fsr:576:{'0' * 64}"


def prompt(images, **fields):
    text = "<image>" * len(images) + " What is this?"
    return {"prompt": text, "multi_modal_data": {"image": images}, "mm_processor_kwargs": fields}


def picture(number):
    return Image.new("RGB", (8, 8), (number % 256, number // 256, 7))


async def ask(llm, name, given):
    from vllm import SamplingParams

    try:
        async for output in llm.generate(given, SamplingParams(max_tokens=2, temperature=0), name):
            last = output
    except ValueError as error:
        return {"error": str(error), "field": getattr(error, "parameter", None)}
    return {"visual": fsr_vllm.visual_tokens(last), "prompt": len(last.prompt_token_ids)}


async def main(model, out):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=model,
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=256 << 20,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        limit_mm_per_prompt={"image": IMAGES},
        worker_extension_cls="tests.engine.probe.ProbeExtension",
        additional_config={"fsr": {}},
    )
    llm = AsyncLLM.from_engine_args(arguments)
    try:
        await llm.collective_rpc("probe_steps")
        numbers = iter(range(REQUESTS * IMAGES))
        batches = [[picture(next(numbers)) for _ in range(IMAGES)] for _ in range(REQUESTS)]
        asked = [
            ask(llm, f"many {i}", prompt(images, fsr_budget=1)) for i, images in enumerate(batches)
        ]
        many = await asyncio.gather(*asked)
        steps = (await llm.collective_rpc("probe_steps"))[0]
        one = picture(70_000)
        single = {
            "pruned": await ask(llm, "pruned", prompt([one], fsr_budget=64)),
            "unpruned": await ask(llm, "unpruned", prompt([one])),
            "text": await ask(llm, "text", {"prompt": "Say something."}),
            "uuid": await ask(
                llm, "uuid", {**prompt([one]), "multi_modal_uuids": {"image": [RESERVED]}}
            ),
        }
    finally:
        llm.shutdown()
    Path(out).write_text(json.dumps({"many": many, "steps": steps, **single}))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
