"""Run in a process of its own: one offline `LLM` of some model family and a list of steps, results
as JSON.

Usage: python families.py SPEC OUT. A step is a list of requests generated together. A request is
{"parts": [...], "fields": {...} or absent}: a part NAME@WxH is a photograph in that size, any other
is text. "uuids" names the images; with "alone" their data stays away. With "then" the request goes
on: its answer and those parts are a second turn. "probe" lists requests of one image, of which a
worker tells rows and signals. A failing step is reported as {"error": ..., "type": [...]}.
"""

import json
import sys
from functools import cache
from pathlib import Path

import fsr_vllm

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 256 << 20,
    "max_model_len": 2048,
    "block_size": 32,
    "limit_mm_per_prompt": {"image": 4},
    "seed": 0,
}


@cache
def picture(part):
    """The photograph of a part NAME@WxH; None for text."""
    from benchmarks.testbed import photos

    name, at, size = part.partition("@")
    width, by, height = size.partition("x")
    if not at or not by or not width.isdecimal():
        return None
    return photos()[name].convert("RGB").resize((int(width), int(height)))


def prompt(request, image="<image>"):
    """The prompt of a request, as `LLM.generate` takes it."""
    images = [picture(part) for part in request["parts"]]
    text = " ".join(
        part if one is None else image for part, one in zip(request["parts"], images, strict=True)
    )
    made = {"prompt": f"USER: {text} ASSISTANT:"}
    if any(images):
        made["multi_modal_data"] = {"image": [one for one in images if one is not None]}
    if "uuids" in request:
        made["multi_modal_uuids"] = {"image": request["uuids"]}
        if request.get("alone"):
            made["multi_modal_data"] = {"image": [None] * len(request["uuids"])}
    if "fields" in request:
        made["mm_processor_kwargs"] = request["fields"]
    return made


def runs(ids, token):
    """Lengths of the runs of a token: the placeholders, where text stands between images."""
    found, length = [], 0
    for each in [*ids, None]:
        if each == token:
            length += 1
        elif length:
            found.append(length)
            length = 0
    return found


def generate(llm, requests):
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=6, temperature=0, logprobs=1, ignore_eos=True)
    token = llm.get_tokenizer().convert_tokens_to_ids("<image>")

    def ask(prompts):
        return [
            {
                "ids": list(out.prompt_token_ids),
                "placeholders": runs(out.prompt_token_ids, token),
                "cached": out.num_cached_tokens or 0,
                "visual": fsr_vllm.visual_tokens(out),
                "text": out.outputs[0].text,
                "tokens": list(out.outputs[0].token_ids),
                "logprobs": [
                    step[token].logprob
                    for token, step in zip(
                        out.outputs[0].token_ids, out.outputs[0].logprobs, strict=True
                    )
                ],
            }
            for out in llm.generate(prompts, sampling, use_tqdm=False)
        ]

    answers = ask([prompt(request) for request in requests])
    for request, answer in zip(requests, answers, strict=True):
        if "then" in request:
            again = prompt(request)
            again["prompt"] += f"{answer['text']}</s>USER: {request['then']} ASSISTANT:"
            (answer["then"],) = ask([again])
    return answers


def main(spec_path, out_path):
    from vllm import LLM

    spec = json.loads(Path(spec_path).read_text())
    llm = LLM(**{**ENGINE, **spec["llm"]})
    results = []
    for step in spec["steps"]:
        try:
            results.append(generate(llm, step))
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            results.append({"error": str(error), "type": kinds})
    found = {"results": results}
    if "probe" in spec:
        found["probed"] = [
            llm.collective_rpc("probe_rows", args=(part, question))
            for part, question in spec["probe"]
        ]
    try:
        found["stats"] = fsr_vllm.stats(llm)
    except ValueError:
        found["stats"] = None
    Path(out_path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
