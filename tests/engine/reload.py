"""Run in a process of its own: one offline `LLM` whose weights are read again, as they were and
after they changed.

Usage: python reload.py MODEL OUT [CHANGED]: CHANGED are other weights of MODEL/text_encoder, put
there while it runs.
"""

import json
import shutil
import sys
from pathlib import Path

QUESTIONS = ("What is this?", "Who has a red flag?", "How many are there?")
BUDGETS = (4, 12, 24)


def answers(llm):
    from vllm import SamplingParams

    from benchmarks.testbed import photos

    image = photos()["chelsea"]
    prompts = [
        {
            # One prompt for all questions: only what is kept of the image can make answers differ.
            "prompt": "USER: <image>\nGo on. ASSISTANT:",
            "multi_modal_data": {"image": [image]},
            "mm_processor_kwargs": {
                "fsr_budget": budget,
                "fsr_question": question,
                "fsr_method": "relevance",
            },
        }
        for question in QUESTIONS
        for budget in BUDGETS
    ]
    outputs = llm.generate(
        prompts, SamplingParams(max_tokens=4, temperature=0, logprobs=1), use_tqdm=False
    )
    return [
        [step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True)]
        for one in (output.outputs[0] for output in outputs)
    ]


def main(model: str, out: str, changed: str | None = None) -> None:
    from vllm import LLM

    llm = LLM(
        model=model, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=128 << 20,
        max_model_len=512, additional_config={"fsr": {}},
    )  # fmt: skip
    found = {"first": answers(llm)}
    if changed:
        reread = {"again": None, "changed": changed}
        for name, weights in reread.items():
            if weights:
                shutil.copy(weights, Path(model) / "text_encoder" / "model.safetensors")
            llm.collective_rpc("reload_weights")
            # The workers' rows are gone; without this vLLM's scheduler counts on them ("Encoder
            # cache miss").
            llm.llm_engine.reset_encoder_cache()
            llm.reset_prefix_cache()
            found[name] = answers(llm)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
