"""What the engines of `test_llava_next` are asked, and how they are configured."""

import os

import fsr_vllm

WHAT, WHO = "What is in the picture?", "Who holds the red ball?"


def request(*parts, then=None, **fields):
    made = {"parts": list(parts), **({"fields": fields} if fields else {})}
    return made | ({"then": then} if then else {})


WIDE, TALL, SQUARE = "chelsea@300x200", "coffee@90x300", "rocket@168x168"
THIN, PADDED, NARROW = "astronaut@300x20", "chelsea@600x20", "coffee@20x600"
PLAIN = [
    request(WIDE, WHAT),
    request("First", THIN, "then", TALL, WHAT),
    request("Say something."),
    request(PADDED, WHO),
    request(NARROW, WHO),
]
OFF = [{**one, "fields": {"fsr_budget": "off"}} for one in PLAIN]
ALL = [{**one, "fields": {"fsr_budget": 192}} for one in PLAIN]

# (request, what is kept of each image: K, method, question, joint)
ASKED = [
    *(
        (request(part, WHAT, fsr_budget=budget, fsr_method="fastervlm"), "fastervlm", "")
        for part in (WIDE, TALL, SQUARE, THIN, PADDED, NARROW)
        for budget in (1, 13, 0.22, 0.97)
    ),
    (request(WIDE, WHAT, fsr_budget=20, fsr_question=WHAT), "fsr", WHAT),
    (request(WIDE, WHAT, fsr_budget=20, fsr_question=WHO), "fsr", WHO),
    (request(WIDE, WHAT, fsr_budget=20), "fsr", ""),
    (
        request(SQUARE, WHO, fsr_budget=24, fsr_question=WHO, fsr_method="relevance"),
        "relevance",
        WHO,
    ),
    (
        request("First", THIN, "then", SQUARE, WHAT, fsr_budget=[7, 31], fsr_question=[WHAT, WHO]),
        "fsr",
        [WHAT, WHO],
    ),
    (
        request(WIDE, "and", NARROW, WHAT, fsr_budget=["off", 0.5], fsr_method="fastervlm"),
        "fastervlm",
        "",
    ),
    (request("Say something."), "", ""),
    (
        request(
            WIDE, "one", THIN, "two", PADDED, WHAT, fsr_budget={"total": 40}, fsr_method="fastervlm"
        ),
        "fastervlm",
        "",
    ),
    (request(TALL, WHAT, fsr_budget={"total": 30}, fsr_question=WHAT), "fsr", WHAT),
]
JOINT = {"tiles": "joint"}
JOINTLY = [
    (
        request(WIDE, WHAT, fsr_budget=20, fsr_method="fastervlm", fsr_options=JOINT),
        "fastervlm",
        "",
    ),
    (request(WIDE, WHAT, fsr_budget=20, fsr_question=WHO, fsr_options=JOINT), "fsr", WHO),
]
ALL_ASKED = [*ASKED, *JOINTLY]
MIXED = [each for each, *_ in ALL_ASKED]
TURNS = [
    request(WIDE, WHAT, fsr_budget=60, fsr_question=WHAT, then="Is there more?"),
    request(
        "First", THIN, "then", SQUARE, WHAT, fsr_budget=[7, 71], fsr_method="fastervlm", then=WHO
    ),
]
SERVED = [name for name, info in fsr_vllm.list_methods().items() if info.servable]
SERVED.remove("codebook")  # no codebook lies beside this checkpoint
METHODS = [
    request(WIDE, WHAT, fsr_budget=45, fsr_method=each, fsr_question=WHAT) for each in SERVED
]
JOINTLY_SERVED = [name for name in SERVED if name not in ("prumerge", "vflowopt")]
METHODS += [
    request(WIDE, WHAT, fsr_budget=45, fsr_method=each, fsr_question=WHAT, fsr_options=JOINT)
    for each in JOINTLY_SERVED
]
NAMED = request(THIN, "and", WIDE, WHAT, fsr_budget=[9, 0.25], fsr_method="fastervlm")
NAMED["uuids"] = ["thin", "wide"]
ALONE = {**NAMED, "alone": True}
# The images; their names alone, in a second engine step; another plan; a name that nobody gave.
UUIDS = [
    NAMED,
    ALONE,
    {**ALONE, "fields": {**NAMED["fields"], "fsr_budget": [9, 0.5]}},
    {**ALONE, "uuids": ["thin", "unknown"]},
    {**NAMED, "uuids": ["wide", "thin"]},
]
BAD = [
    request(WIDE, THIN, WHAT, fsr_budget=[8]),
    request(WIDE, THIN, WHAT, fsr_budget={"total": 1}),
    request(WIDE, WHAT, fsr_budget=[{"total": 8}]),
    request(WIDE, WHAT, fsr_budget=8, fsr_method="vflowopt", fsr_options=JOINT),
    request(WIDE, WHAT, fsr_budget=8, fsr_options={"tiles": "both"}),
]
CORES = sorted(os.sched_getaffinity(0))
PROBE = {"worker_extension_cls": "tests.engine.probe.ProbeExtension"}
NO_CACHES = {
    "additional_config": {"fsr": {"feature_cache_bytes": 0, "pixel_cache_bytes": 0}},
    "enable_prefix_caching": False,
    "mm_processor_cache_gb": 0,
}
CONFIGURATIONS = {
    "stock": {"llm": {}, "steps": [PLAIN], "env": {"VLLM_PLUGINS": "none"}},
    "active": {
        "llm": {"additional_config": {"fsr": {}}, **PROBE},
        "steps": [PLAIN, OFF, ALL, MIXED, MIXED, TURNS, METHODS]
        + [[one] for one in (*BAD, *UUIDS)]
        + [PLAIN],
        "probe": [(part, WHO) for part in (WIDE, TALL, THIN, PADDED, NARROW)],
    },
    "no caches": {"llm": NO_CACHES, "steps": [PLAIN, *[[one] for one in MIXED], TURNS]},
    "chunked": {
        "llm": {"additional_config": {"fsr": {}}, "max_num_batched_tokens": 32, "max_num_seqs": 8},
        "steps": [PLAIN, MIXED],
    },
    "tensor parallel": {
        "llm": {"additional_config": {"fsr": {}}, **PROBE, "tensor_parallel_size": 2},
        "steps": [PLAIN, MIXED],
        "probe": [(part, WHO) for part in (WIDE, THIN)],
        # One core each where there are two.
        "env": {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, (CORES * 2)[:2]))},
    },
    "maximum": {
        "llm": {"additional_config": {"fsr": {"max_budget": 40, "min_budget": 4}}},
        "steps": [
            [request(WIDE, WHAT)],
            [request(WIDE, WHAT, fsr_budget="off")],
            [request(WIDE, WHAT, fsr_budget=0.5)],
            [request(WIDE, THIN, WHAT, fsr_budget={"total": 90})],
            [request(WIDE, THIN, WHAT, fsr_budget={"total": 50})],
            [request(WIDE, PADDED, WHAT, fsr_budget={"total": 6})],
        ],
    },
}


def images(made):
    """The parts of a request that are images."""
    return [part for part in made["parts"] if "@" in part]
