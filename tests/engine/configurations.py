"""The configurations of vLLM that `test_offline` runs, and the requests it asks in each."""

import os

import fsr_vllm

WHAT, WHO = "What is this?", "Who has a red flag?"


def request(*parts, **fields):
    return {"parts": list(parts), **({"fields": fields} if fields else {})}


# Without pruning: one image, two images with text between, text only, the same image again.
PLAIN = [
    request("chelsea", WHAT),
    request("First", "chelsea", "then", "rocket", WHAT),
    request("Say something."),
    request("chelsea", WHO),
]
OFF = [{**r, "fields": {"fsr_budget": "off"}} for r in PLAIN]
ALL = [
    {**r, "fields": {"fsr_budget": budget}}
    for r, budget in zip(PLAIN, (576, 1000, 1_000_000, 577), strict=True)
]
# One image at several budgets, questions and methods, interleaved: what one leaves in a cache must
# not serve another.
MIXED = [
    request("chelsea", WHAT, fsr_budget=64, fsr_question=WHAT),
    request("chelsea", WHAT, fsr_budget=128, fsr_question=WHAT),
    request("chelsea", WHAT),
    request("chelsea", WHO, fsr_budget=64, fsr_question=WHO),
    request("chelsea", WHAT, fsr_budget=64, fsr_question=WHO),
    request("chelsea", WHAT, fsr_budget=64, fsr_question=WHAT, fsr_options={"scan": "farthest"}),
    request("chelsea", WHAT, fsr_budget=64, fsr_method="random"),
    request("First", "chelsea", "then", "rocket", WHAT, fsr_budget=[16, 100]),
    request("First", "chelsea", "then", "rocket", WHAT, fsr_budget=["off", 0.25]),
    request("chelsea", WHAT, fsr_budget=64, fsr_question=WHAT),
    request("chelsea", WHAT, fsr_budget=1),
]
PROMPTS = [64, 128, 576, 64, 64, 64, 64, 116, 720, 64, 1]  # visual tokens of MIXED
ONE_BY_ONE = [[r] for r in MIXED]
MANY = request(
    "rocket", "coffee", "astronaut", "chelsea", "camera", WHAT
)  # 2,880 tokens, of 2,048 that fit

ACTIVE = {"additional_config": {"fsr": {}}}
PROBE = {
    "worker_extension_cls": "tests.engine.probe.ProbeExtension"
}  # a user's own: combined with ours
# Every method that this model can give its inputs to, by changing one word.
REFUSED = [name for name, info in fsr_vllm.list_methods().items() if not info.servable]
SERVED = [name for name, info in fsr_vllm.list_methods().items() if info.servable]
BAD = [
    {"fsr_budget": 0},
    {"fsr_budget": [64, 64]},
    {"fsr_budget": True},
    {"fsr_method": "nope"},
    {"fsr_options": {"nope": 1}},
    {"fsr_question": 3},
]
CONFIGURATIONS = {
    "stock": {"llm": {}, "steps": [PLAIN, [MANY]], "env": {"VLLM_PLUGINS": "none"}},
    "inactive": {"llm": {}, "steps": [PLAIN, [request("chelsea", WHAT, fsr_budget=64)]]},
    "active": {
        "llm": {
            **ACTIVE,
            "block_size": 32,
        },  # small, so that short prompts fill blocks that can be reused
        "steps": [PLAIN, OFF, ALL, *ONE_BY_ONE, *ONE_BY_ONE, MIXED]
        + [[request("chelsea", WHAT, **fields)] for fields in BAD]
        + [MIXED],
    },
    "no caches": {
        "llm": {
            "additional_config": {"fsr": {"feature_cache_bytes": 0, "pixel_cache_bytes": 0}},
            "enable_prefix_caching": False,
            "mm_processor_cache_gb": 0,
            **PROBE,
        },
        "probe": True,
        "steps": [
            *ONE_BY_ONE,
            *(
                [request("coffee", WHAT, fsr_budget=40, fsr_method=m, fsr_question=WHAT)]
                for m in (*SERVED, *REFUSED)
            ),
        ],
    },
    "chunked": {
        "llm": {
            **ACTIVE,
            "max_num_batched_tokens": 48,
            "max_num_seqs": 8,
            "mm_processor_cache_type": "shm",
        },
        "steps": [*ONE_BY_ONE, MIXED],
    },
    "tensor parallel": {
        # Without caches of its own vLLM does not even hash images.
        "llm": {
            **ACTIVE,
            **PROBE,
            "tensor_parallel_size": 2,
            "enable_prefix_caching": False,
            "mm_processor_cache_gb": 0,
        },
        "probe": True,
        "steps": [*ONE_BY_ONE, MIXED],
        # One core each; vLLM would bind two ranks to NUMA nodes, which a small machine has too few
        # of.
        "env": {
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
        },
    },
    "maximum": {
        "llm": {
            "additional_config": {"fsr": {"max_budget": 64, "min_budget": 8, "text_encoder": "llm"}}
        },
        "steps": [
            [request("chelsea", WHAT)],
            [request("chelsea", WHAT, fsr_budget="off")],
            [request("chelsea", WHAT, fsr_budget=65)],
            [request("chelsea", WHAT, fsr_budget=0.5)],
            [request("chelsea", WHAT, fsr_budget=7)],
            [request("chelsea", WHAT, fsr_budget=64, fsr_question=WHAT)],
            [request("chelsea", WHAT, fsr_budget=64, fsr_question=WHO)],
            [request("rocket", "coffee", "astronaut", WHAT, fsr_budget=32)],
            [MANY],
        ],
    },
}
