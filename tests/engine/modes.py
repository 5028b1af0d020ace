"""Run in a process of its own: one offline `LLM` in some mode of vLLM, asked what every mode is
asked.

Usage: python modes.py SPEC OUT. SPEC has `llm` (arguments), and may have `lora` (folder of an
adapter, then asked too), `between` (methods of `LLM` called between two rounds of the same
requests) and `requests` (whether to go on with what a request can ask of vLLM: REQUEST_LEVEL). A
start that fails leaves no OUT.
"""

import json
import sys
from pathlib import Path

WHAT, WHO = "What is this?", "Who has a red flag?"
BUDGETS = ("off", 8, 24)
# (images, question, budget): one picture, two questions, unpruned and two budgets; two pictures; no
# picture at all.
ASKED = [
    *((1, question, budget) for question in (WHAT, WHO) for budget in BUDGETS),
    (2, WHAT, [8, 0.5]),
    (0, WHO, None),
]
VISUAL = [64, 8, 24, 64, 8, 24, 40, 0]  # tokens that the images of ASKED must have
COLOURS = {"type": "object", "properties": {"red": {"type": "boolean"}}, "required": ["red"]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": COLOURS}}
TOOL_TEMPLATE = (
    "USER: {% for tool in tools or [] %}{{ tool.function.name }} "
    "{{ tool.function.parameters | tojson }} {% endfor %}"
    "{% for part in messages[0].content %}"
    "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}ASSISTANT:"
)


def prompt(images, question, budget):
    from benchmarks.testbed import photos

    pictures = photos()
    asked = {"prompt": "USER: " + "<image> and " * images + f"{question} ASSISTANT:"}
    if images:
        asked["multi_modal_data"] = {
            "image": [pictures[name] for name in ("chelsea", "rocket")[:images]]
        }
        asked["mm_processor_kwargs"] = {"fsr_budget": budget, "fsr_question": question}
    return asked


def answers(outputs):
    """Every completion of every request, with what shows that two engines did the same."""
    return [
        {
            "prompt": len(output.prompt_token_ids),
            "placeholders": sum(ids == IMAGE_ID for ids in output.prompt_token_ids),
            "cached": output.num_cached_tokens or 0,
            "texts": [one.text for one in output.outputs],
            "tokens": [list(one.token_ids) for one in output.outputs],
            "logprobs": [
                [
                    step[token].logprob
                    for token, step in zip(one.token_ids, one.logprobs or [], strict=False)
                ]
                for one in output.outputs
            ],
            "ranked": [[len(step) for step in one.logprobs or []] for one in output.outputs],
            "prompt_logprobs": [
                entry and max(entry.values(), key=lambda one: one.logprob).logprob
                for entry in output.prompt_logprobs or []
            ],
        }
        for output in outputs
    ]


def ask(llm, asked=ASKED, lora=None, together=True, **options):
    from vllm import SamplingParams

    sampling = SamplingParams(
        **{"max_tokens": 8, "temperature": 0, "logprobs": 1, "ignore_eos": True, **options}
    )
    prompts = [prompt(*one) for one in asked]
    batches = [prompts] if together else [[one] for one in prompts]
    return [
        answer
        for batch in batches
        for answer in answers(llm.generate(batch, sampling, use_tqdm=False, lora_request=lora))
    ]


# What a request can ask for
# -----------------------------------------------------------------------------------------


def structured(llm):
    from vllm.sampling_params import StructuredOutputsParams

    ways = {
        "choice": {"choice": ["left", "right"]},
        "json": {"json": COLOURS},
        "regex": {"regex": "[0-9]{3}"},
    }
    return {
        name: ask(
            llm, structured_outputs=StructuredOutputsParams(**way), max_tokens=24, ignore_eos=False
        )
        for name, way in ways.items()
    }


def beams(llm):
    from vllm.sampling_params import BeamSearchParams

    found = []
    for images, question, budget in ASKED:
        given = prompt(images, question, budget)
        (output,) = llm.beam_search([given], BeamSearchParams(beam_width=3, max_tokens=4))
        found.append(
            [[one.tokens, one.cum_logprob, one.tokens.count(IMAGE_ID)] for one in output.sequences]
        )
    return found


def tools(llm):
    """A conversation with a tool in its prompt, by a template that writes tools down, at each
    budget.
    """
    from vllm import SamplingParams

    from benchmarks.testbed import photos

    image = {"type": "image_pil", "image_pil": photos()["chelsea"]}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": WHAT}]}]
    sampling = SamplingParams(max_tokens=8, temperature=0, logprobs=1, ignore_eos=True)
    given = {
        "chat_template": TOOL_TEMPLATE,
        "chat_template_content_format": "openai",
        "use_tqdm": False,
    }
    return [
        answers(
            llm.chat(
                messages, sampling, tools=use, mm_processor_kwargs={"fsr_budget": budget}, **given
            )
        )[0]
        for use in (None, [TOOL])
        for budget in BUDGETS
    ]


def continued(llm):
    """Every prompt with its answer behind it: what the answer's tokens are worth as a part of the
    prompt.
    """
    from vllm import SamplingParams

    tokenizer, found = llm.get_tokenizer(), []
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    for one, answer in zip(ASKED, ask(llm), strict=True):
        given = prompt(*one)
        (tokens,) = answer["tokens"]
        given["prompt_token_ids"] = [*tokenizer.encode(given.pop("prompt")), *tokens]
        (output,) = llm.generate([given], sampling, use_tqdm=False)
        entries = output.prompt_logprobs[-len(tokens) :]
        of_answer = [entry[token].logprob for entry, token in zip(entries, tokens, strict=True)]
        found.append(
            {"placeholders": output.prompt_token_ids.count(IMAGE_ID), "of_answer": of_answer}
        )
    return found


REQUEST_LEVEL = {
    "continued": continued,
    "structured": structured,
    "logprobs": lambda llm: ask(llm, logprobs=5),
    "prompt_logprobs": lambda llm: ask(llm, prompt_logprobs=1),
    "several": lambda llm: ask(llm, n=3, temperature=1.0, seed=7),
    "beams": beams,
    "tools": tools,
}


def main(spec_path: str, out_path: str) -> None:
    from vllm import LLM

    import fsr_vllm

    spec = json.loads(Path(spec_path).read_text())
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 128 << 20,
        "max_model_len": 512,
        "block_size": 32,
        "limit_mm_per_prompt": {"image": 2},
        "additional_config": {"fsr": {}},
    }
    llm = LLM(**{**options, **spec["llm"]})
    global IMAGE_ID
    IMAGE_ID = llm.get_tokenizer().convert_tokens_to_ids("<image>")
    result = {"together": ask(llm)}
    for name, arguments in spec.get("between", {}).items():
        getattr(llm, name)(**arguments)
    result["alone"] = ask(llm, together=False)
    if "lora" in spec:
        from vllm.lora.request import LoRARequest

        result["adapter"] = ask(llm, lora=LoRARequest("one", 1, spec["lora"]))
    for name, run in REQUEST_LEVEL.items() if spec.get("requests") else ():
        result[name] = run(llm)
    result["stats"] = fsr_vllm.stats(llm)
    result["after"] = ask(llm)
    Path(out_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
