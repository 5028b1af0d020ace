"""Run in a process of its own: a small random Qwen2.5-VL, which the plugin does not prune, asked in
every way.

Usage: python unsupported.py FOLDER OUT. FOLDER gets the checkpoint; OUT gets, by step, the answer's
text or the error.
"""

import asyncio
import json
import sys
from pathlib import Path

from benchmarks.testbed import photos

ENGINE = {
    "load_format": "dummy", "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 4,
    "kv_cache_memory_bytes": 64 << 20, "limit_mm_per_prompt": {"image": 1, "video": 0},
}  # fmt: skip
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}"
    f"{IMAGE}" + "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
FIELDS = {"fsr_budget": 16}


def build(path: Path) -> Path:
    """Configuration, tokenizer and processor of Qwen2.5-VL in small; weights are vLLM's dummy ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
    )
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    words = [*SPECIAL, "<|video_pad|>", "[UNK]", *["What", "is", "this", "Say", "something"]]
    plain = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        unk_token="[UNK]",
        additional_special_tokens=[*SPECIAL[3:], "<|video_pad|>"],
        chat_template=TEMPLATE,
    )
    sizes = {"min_pixels": 56 * 56, "max_pixels": 112 * 112}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes),
        tokenizer,
        Qwen2VLVideoProcessor(**sizes),
        chat_template=TEMPLATE,
    ).save_pretrained(path)
    ids = {word: i for i, word in enumerate(words)}
    common = {"hidden_size": 64, "intermediate_size": 64}
    config = Qwen2_5_VLConfig(
        text_config={
            **common, "vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 1024, "eos_token_id": ids["<|im_end|>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        },
        vision_config={**common, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )  # fmt: skip
    config.save_pretrained(path)
    return path


def prompt(*, image: bool = True, fields: dict | None = None) -> dict:
    made: dict = {"prompt": f"{IMAGE if image else ''} What is this"}
    if image:
        made["multi_modal_data"] = {"image": photos()["chelsea"].resize((112, 112))}
    if fields is not None:
        made["mm_processor_kwargs"] = fields
    return made


def said(call) -> dict:
    try:
        return {"tokens": call()}
    except Exception as error:
        return {"error": str(error), "type": [kind.__name__ for kind in type(error).__mro__]}


def offline(model: str) -> dict:
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, additional_config={"fsr": {}}, **ENGINE)
    sampling = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    extra = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, extra_args=FIELDS)
    part = {"type": "image_pil", "image_pil": photos()["chelsea"].resize((112, 112))}
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "What is this"}]}]

    def generate(given, parameters=sampling):
        return lambda: list(llm.generate([given], parameters, use_tqdm=False)[0].prompt_token_ids)

    steps = {
        "generate": generate(prompt()),
        "generate with a budget": generate(prompt(fields=FIELDS)),
        "generate with a misspelt budget": generate(prompt(fields={"fsrBudget": 16})),
        "text with a budget": generate(prompt(image=False, fields=FIELDS)),
        "extra_args": generate(prompt(), extra),
        "chat": lambda: list(llm.chat(chat, sampling, use_tqdm=False)[0].prompt_token_ids),
        "chat with a budget": lambda: llm.chat(
            chat, sampling, use_tqdm=False, mm_processor_kwargs=FIELDS
        ),
        "a raw prompt of the engine": lambda: llm.llm_engine.add_request(
            "1", prompt(fields=FIELDS), sampling
        ),
        "null": generate(prompt(fields={"fsr_budget": None})),
        "generate again": generate(prompt()),
    }
    return {name: said(call) for name, call in steps.items()}


async def asynchronous(model: str) -> dict:
    """An AsyncLLM of a user, where the plugin is installed and not active."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **ENGINE))
    sampling = {"max_tokens": 2, "temperature": 0, "ignore_eos": True}
    found = {}
    for name, given, more in (
        ("async", prompt(), {}),
        ("async with a budget", prompt(fields=FIELDS), {}),
        ("async text with a budget", prompt(image=False, fields=FIELDS), {}),
        ("async extra_args", prompt(), {"extra_args": FIELDS}),
        ("async again", prompt(), {}),
    ):
        try:
            answers = [
                one
                async for one in engine.generate(given, SamplingParams(**sampling, **more), name)
            ]
            found[name] = {"tokens": list(answers[-1].prompt_token_ids)}
        except Exception as error:
            found[name] = {
                "error": str(error),
                "type": [kind.__name__ for kind in type(error).__mro__],
            }
    engine.shutdown()
    return found


if __name__ == "__main__":
    checkpoint = str(build(Path(sys.argv[1])))
    results = offline(checkpoint)
    Path(sys.argv[2]).write_text(json.dumps(results | asyncio.run(asynchronous(checkpoint))))
