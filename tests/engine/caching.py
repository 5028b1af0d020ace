"""Run in a process of its own: one offline `LLM`, shuffled requests over many images, then single
experiments.

Usage: python caching.py SPEC OUT, where SPEC has `llm` (arguments), `count` (requests of the
shuffle) and `experiments` (whether to go on with those of EXPERIMENTS). Every experiment gets
images that nothing before it saw.
"""

import itertools
import json
import random
import sys
from pathlib import Path

QUESTIONS = ("What is this?", "Who has a red flag?", "How many are there?", "")
BUDGETS = (1, 12, 0.5, 63, "off")
METHODS = ("fsr", "vscan", "divprune")  # whose signals are kept of every image
IMAGES = 20
TEXT = (
    "Describe it at length, and say what the people in it do, what they wear, "
    "and where they all may be going to."
)


def pictures():
    """Any number of different images: crops of photographs."""
    from benchmarks.testbed import photos

    originals = list(photos().values())
    for number in itertools.count():
        image = originals[number % len(originals)]
        left = 7 * (number // len(originals))
        yield image.crop((left, left, left + 150, left + 140))


def combinations(count):
    """The first `count` of all combinations of image, question, budget and method, in an order that
    is always the same.

    Every image comes: the first ones differ in it.
    """
    rest = list(itertools.product(range(IMAGES), QUESTIONS, BUDGETS, METHODS))
    random.Random(0).shuffle(rest)
    first = [next(c for c in rest if c[0] == image) for image in range(IMAGES)]
    chosen = [*first, *(c for c in rest if c not in first)][:count]
    random.Random(1).shuffle(chosen)
    return chosen


class Engine:
    def __init__(self, llm):
        self.llm, self.fresh = llm, pictures()

    def prompt(self, image, text="Go on.", ids=None, salt=None, uuid=None, **fields):
        prompt = (
            {"prompt_token_ids": ids} if ids else {"prompt": f"USER: <image>\n{text} ASSISTANT:"}
        )
        prompt |= {"multi_modal_data": {"image": [image]}, "mm_processor_kwargs": fields}
        prompt |= {"cache_salt": salt} if salt else {}
        return prompt | ({"multi_modal_uuids": {"image": [uuid]}} if uuid else {})

    def run(self, prompts, tokens=4, lora=None):
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=tokens, temperature=0, logprobs=1, ignore_eos=True)
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
        return [self.answer(output) for output in outputs]

    def ask(self, image, text="Go on.", lora=None, **options):
        return self.run([self.prompt(image, text, **options)], lora=lora)[0]

    @staticmethod
    def answer(output):
        (out,) = output.outputs
        steps = zip(out.token_ids, out.logprobs, strict=True)
        return {
            "prompt": len(output.prompt_token_ids),
            "cached": output.num_cached_tokens or 0,
            "tokens": list(out.token_ids),
            "logprobs": [step[token].logprob for token, step in steps],
        }

    def counts(self):
        """Images preprocessed and encoded so far, and what both caches hold."""
        import fsr_vllm

        stats = fsr_vllm.stats(self.llm)
        worker = stats["workers"][0]
        return {
            "preprocessed": stats["preprocessed_images"],
            "encoded": worker["tower_images"],
            "pixels": stats.get("pixel_bytes"),
            "features": worker.get("feature_bytes"),
        }


def interleaved(engine, count):
    images = list(itertools.islice(engine.fresh, IMAGES))
    prompts = [
        engine.prompt(
            images[image],
            question or TEXT,
            fsr_budget=budget,
            fsr_method=method,
            fsr_question=question,
        )
        for image, question, budget, method in combinations(count)
    ]
    half = len(prompts) // 2  # some together, as a scheduler mixes them, and some one by one
    answers = engine.run(prompts[:half]) + [engine.run([prompt])[0] for prompt in prompts[half:]]
    return {"answers": answers, "counts": engine.counts()}


# --- experiments ----------------------------------------------------------------------------------


def missing_signal(engine, **_):
    """visionzip needs keys and hiprune attention received, which an image first seen by fsr is kept
    without.
    """
    image, seen = next(engine.fresh), []
    methods = ("fsr", "visionzip", "fsr", "visionzip", "vscan", "hiprune", "visionzip", "hiprune")
    for budget, method in enumerate(methods, 8):
        engine.ask(image, fsr_budget=budget, fsr_method=method)
        seen.append(engine.counts()["encoded"])
    return seen


def twice_in_one_prompt(engine, **_):
    image, before = next(engine.fresh), engine.counts()
    prompt = engine.prompt(image, fsr_budget=[8, 9])
    prompt["prompt"] = "USER: <image> and <image>\nGo on. ASSISTANT:"
    prompt["multi_modal_data"] = {"image": [image, image.copy()]}
    answer = engine.run([prompt])[0]
    return {"before": before, "after": engine.counts(), "prompt": answer["prompt"]}


def turns(engine, **_):
    """A second turn, exactly the first one's tokens and answer continued."""
    image = next(engine.fresh)
    tokenizer = engine.llm.get_tokenizer()
    ids = tokenizer.encode(f"USER: <image>\n{TEXT} ASSISTANT:")
    fields = {"fsr_budget": 32, "fsr_question": TEXT}
    (first,) = engine.run([engine.prompt(image, ids=ids, **fields)], tokens=40)
    later = [
        *ids,
        *first["tokens"],
        *tokenizer.encode(" USER: And now? ASSISTANT:", add_special_tokens=False),
    ]
    second = engine.ask(image, ids=later, **fields)
    other = engine.ask(image, ids=later, **{**fields, "fsr_question": "And now?"})
    return {"first": first, "second": second, "other question": other}


def prefixes(engine, **_):
    """The same image with one question after another: how much of the second prompt came from the
    KV cache.
    """
    found = {}
    for name, fields in {
        "query-aware": {"fsr_method": "fsr"},
        "fsr_question empty": {"fsr_method": "fsr", "fsr_question": ""},
        "query-agnostic method": {"fsr_method": "hiprune"},
    }.items():
        image, answers = next(engine.fresh), []
        for question in QUESTIONS[:2]:
            answers.append(
                engine.ask(
                    image, question, **{"fsr_question": question, "fsr_budget": 63, **fields}
                )
            )
        found[name] = answers
    return found


def salts(engine, **_):
    image = next(engine.fresh)
    return [engine.ask(image, TEXT, fsr_budget=32, salt=salt) for salt in ("a", "b", "a", None)]


def uuids(engine, **_):
    image = next(engine.fresh)
    steps = [(32, "first"), (32, "second"), (32, "first"), (40, "first"), (40, None)]
    return [engine.ask(image, TEXT, fsr_budget=budget, uuid=uuid) for budget, uuid in steps]


def adapters(engine, lora, **_):
    from vllm.lora.request import LoRARequest

    image = next(engine.fresh)
    order = [
        None,
        *(LoRARequest(name, number, lora) for number, name in ((1, "one"), (2, "two"))),
        None,
    ]
    answers = [engine.ask(image, TEXT, lora=adapter, fsr_budget=32) for adapter in order]
    return {"answers": answers, "counts": engine.counts()}


def resets(engine, **_):
    """What each of vLLM's resets leaves, and that the same image then costs its way again, with the
    same answer.
    """
    image, found = next(engine.fresh), {}
    reset = {
        "nothing": lambda: None,
        "reset_mm_cache": engine.llm.reset_mm_cache,
        "reset_encoder_cache": lambda: engine.llm.llm_engine.reset_encoder_cache(),
        "sleep": lambda: (engine.llm.sleep(level=1), engine.llm.wake_up()),
        "reload_weights": lambda: engine.llm.collective_rpc("reload_weights"),
    }
    for number, (name, act) in enumerate(reset.items()):
        engine.ask(image, fsr_budget=20)
        act()
        emptied = engine.counts()
        answer = engine.ask(image, fsr_budget=30 + number)
        found[name] = {
            "emptied": emptied,
            "after": engine.counts(),
            "again": engine.ask(image, fsr_budget=20),
        }
        assert answer["prompt"]
    return found


EXPERIMENTS = (missing_signal, twice_in_one_prompt, turns, prefixes, salts, uuids, adapters, resets)


def main(spec_path: str, out_path: str) -> None:
    from vllm import LLM

    spec = json.loads(Path(spec_path).read_text())
    llm = LLM(
        dtype="float32", enforce_eager=True, kv_cache_memory_bytes=512 << 20, max_model_len=1024,
        block_size=32, limit_mm_per_prompt={"image": 2}, **spec["llm"],
    )  # fmt: skip
    engine = Engine(llm)
    result = {"interleaved": interleaved(engine, spec["count"])}
    for experiment in EXPERIMENTS if spec["experiments"] else ():
        result[experiment.__name__] = experiment(engine, **spec["experiments"])
    Path(out_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
