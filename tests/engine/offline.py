"""Run in a process of its own: one offline `LLM` and a list of steps, results as JSON.

Usage: python offline.py SPEC OUT. A step is a list of requests generated together, in one batch. A
request is {"parts": [...], "fields": {...} or absent}: a part that names a photograph is that
image, any other is text. A step {"chat": [[[role, part, ...], ...], ...], "fields": {...}} goes
through `LLM.chat` instead, a conversation each; with "numpy", numbers of its fields are NumPy's. A
part "embeds:N" is an image of N precomputed rows. A failing step is reported as {"error": ...,
"type": [...]}.
"""

import base64
import io
import json
import sys
from pathlib import Path

import numpy
import torch

import fsr_vllm
from benchmarks.testbed import data_url


def embedding(part):
    """The rows of a part "embeds:N"; None for any other part."""
    kind, _, rows = part.partition(":")
    return torch.ones(int(rows), 64) if kind == "embeds" else None


def prompt_of(request, pictures):
    images = [pictures[part] if part in pictures else embedding(part) for part in request["parts"]]
    text = "\n".join(
        part if image is None else "<image>"
        for part, image in zip(request["parts"], images, strict=True)
    )
    images = [image for image in images if image is not None]
    prompt = {"prompt": f"USER: {text} ASSISTANT:"}
    if images:
        prompt["multi_modal_data"] = {"image": images}
    if "fields" in request:
        prompt["mm_processor_kwargs"] = request["fields"]
    return prompt


def generate(llm, requests, pictures):
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=10, temperature=0, logprobs=1)
    if isinstance(requests, dict):
        outputs = chat(llm, requests, pictures, sampling)
    else:
        outputs = llm.generate(
            [prompt_of(request, pictures) for request in requests], sampling, use_tqdm=False
        )
    return [
        {
            "prompt": len(out.prompt_token_ids),
            "cached": out.num_cached_tokens or 0,
            "visual": fsr_vllm.visual_tokens(out),
            "tokens": list(out.outputs[0].token_ids),
            "logprobs": [
                step[token].logprob
                for token, step in zip(
                    out.outputs[0].token_ids, out.outputs[0].logprobs, strict=True
                )
            ],
        }
        for out in outputs
    ]


def chat(llm, step, pictures, sampling):
    """LLM.chat on conversations of (role, part, ...); a part "name:detail" is a photograph with
    that detail, and "name:detail:key" one with that key of its own."""

    def part(text):
        name, detail, key = (*text.split(":"), "", "")[:3]
        if (rows := embedding(text)) is not None:
            torch.save(rows, data := io.BytesIO())
            return {
                "type": "image_embeds",
                "image_embeds": base64.b64encode(data.getvalue()).decode(),
            }
        if name not in pictures:
            return {"type": "text", "text": text}
        if not detail:
            return {"type": "image_pil", "image_pil": pictures[name]}
        url = {"url": data_url(pictures[name]), "detail": detail}
        return {"type": "image_url", "image_url": url} | ({key: 64} if key else {})

    conversations = [
        [{"role": role, "content": [part(text) for text in parts]} for role, *parts in turns]
        for turns in step["chat"]
    ]
    fields = step.get("fields")
    if step.get("numpy"):
        fields = {key: numpy.array(value)[()] for key, value in fields.items()}
    return llm.chat(conversations, sampling, use_tqdm=False, mm_processor_kwargs=fields)


def main(spec_path: str, out_path: str) -> None:
    from vllm import LLM

    from benchmarks.testbed import photos

    spec = json.loads(Path(spec_path).read_text())
    pictures = photos()
    llm = LLM(
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=256 << 20,
        max_model_len=2048,
        limit_mm_per_prompt={"image": 5},
        **spec["llm"],
    )
    results = []
    for step in spec["steps"]:
        try:
            results.append(generate(llm, step, pictures))
        except Exception as error:
            results.append(
                {"error": str(error), "type": [kind.__name__ for kind in type(error).__mro__]}
            )
    try:
        stats = fsr_vllm.stats(llm)
    except ValueError as error:
        stats = {"error": str(error)}
    signals = (
        llm.collective_rpc("probe_signals", args=tuple(spec["probe"])) if "probe" in spec else None
    )
    Path(out_path).write_text(json.dumps({"results": results, "stats": stats, "signals": signals}))


if __name__ == "__main__":
    main(*sys.argv[1:])
