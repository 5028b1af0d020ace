"""What a request costs on this machine, part by part: the service times that the simulation of
budgets under load uses.

    python -m benchmarks.servicetimes

Starts one offline engine on the generated LLaVA (random weights, with a language model wide enough
that prefill matters), runs single requests at several budgets and batches of several sizes, fits
straight lines, and writes service-times-cpu.json into --out. Takes a few minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.testbed.checkpoint import build_checkpoint
from benchmarks.testbed.photos import photos

from .records import write_json
from .report import machine

MODEL = {"hidden_size": 768, "layers": 8}
BUDGETS = (32, 64, 128, 192, 288, 432)
QUESTION = "What is in this picture?"


def pictures(count: int, side: int = 336) -> Iterator[Any]:
    """Different pictures: windows of the photographs, so that no cache knows them."""
    sources = [image.convert("RGB").resize((side + 64, side + 64)) for image in photos().values()]
    for index in range(count):
        left, top = index // len(sources) * 7 % 64, index // len(sources) // 9 * 5 % 64
        yield sources[index % len(sources)].crop((left, top, left + side, top + side))


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope of the least-squares line through (x, y)."""
    x0, y0 = statistics.fmean(x for x, _ in points), statistics.fmean(y for _, y in points)
    slope = sum((x - x0) * (y - y0) for x, y in points) / sum((x - x0) ** 2 for x, _ in points)
    return y0 - slope * x0, slope


class Engine:
    """An offline engine in this process, and what of a call was spent on preparing the request."""

    def __init__(self, model: str) -> None:
        from vllm import LLM

        self.llm = LLM(
            model, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=512 << 20,
            max_model_len=2048, limit_mm_per_prompt={"image": 1}, additional_config={"fsr": {}},
        )  # fmt: skip
        self.preparing = 0.0
        processor = self.llm.llm_engine.renderer.get_mm_processor()
        apply = processor.apply

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return apply(*args, **kwargs)
            finally:
                self.preparing += time.perf_counter() - started

        processor.apply = timed

    def run(self, prompts: list[dict[str, Any]], tokens: int = 1) -> tuple[float, float, int]:
        """Seconds of preparing, seconds of the rest, prompt tokens of the first."""
        from vllm import SamplingParams

        self.preparing, started = 0.0, time.perf_counter()
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        whole = time.perf_counter() - started
        return self.preparing, whole - self.preparing, len(outputs[0].prompt_token_ids or ())


def measured(engine: Engine, repeats: int) -> dict[str, Any]:
    """Medians of single requests, the lines through them, and seconds of a decode step by batch
    size.
    """
    stock = pictures(len(BUDGETS) * repeats + 8)
    number = iter(range(10**6))

    def image_prompt(budget: int) -> dict[str, Any]:
        fields = {"fsr_budget": budget, "fsr_question": QUESTION}
        text = f"USER: <image>\n{next(number)} {QUESTION} ASSISTANT:"
        return {
            "prompt": text,
            "multi_modal_data": {"image": next(stock)},
            "mm_processor_kwargs": fields,
        }

    def text_prompt(words: int) -> dict[str, Any]:
        return {"prompt": f"{next(number)} " + "red " * words}

    for _ in range(4):
        engine.run([image_prompt(288)])
    by_image, preparing = _medians(
        lambda budget: engine.run([image_prompt(budget)]), BUDGETS, repeats
    )
    by_text, _ = _medians(
        lambda words: engine.run([text_prompt(words)]), (32, 128, 288, 432), repeats
    )
    base, per_text_token = line(by_text)
    image_base, per_token = line(by_image)
    steps = {}
    for batch in (1, 4, 8, 16):
        prompts = [text_prompt(16) for _ in range(batch)]
        engine.run(prompts)  # now its prefix is cached: what differs is decoding alone
        times = [engine.run(prompts, 17)[1] - engine.run(prompts, 1)[1] for _ in range(3)]
        steps[batch] = max(0.0, statistics.median(times) / 16)
    step, per_sequence = line([(float(batch), seconds) for batch, seconds in steps.items()])
    return {
        "prepare": statistics.median(preparing),
        "step": base,
        "encode": image_base - base,
        "prefill_per_token": per_token,
        "decode_step": step,
        "decode_per_sequence": per_sequence,
        "measured": {
            "image": by_image,
            "text": by_text,
            "decode_step": steps,
            "prefill_per_text_token": per_text_token,
        },
    }


def _medians(
    run: Callable[[int], tuple[float, float, int]], sizes: Sequence[int], repeats: int
) -> tuple[list[tuple[float, float]], list[float]]:
    """(prompt tokens, median seconds) per size, and all times of preparing; sizes in turns, so that
    all share noise.
    """
    found: dict[int, list[tuple[float, float, int]]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size in sizes:
            found[size].append(run(size))
    lines = [
        (float(runs[0][2]), statistics.median(seconds for _, seconds, _ in runs))
        for runs in found.values()
    ]
    return lines, [prepared for runs in found.values() for prepared, _, _ in runs]


def main(argv: list[str] | None = None) -> int:
    """Measure, and write service-times-cpu.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1"
    )
    about = machine("cpu")
    with tempfile.TemporaryDirectory(prefix="fsr-times-") as folder:
        found = measured(Engine(str(build_checkpoint(folder, **MODEL))), args.repeats)
    command = " ".join(
        ["python -m benchmarks.servicetimes", *(sys.argv[1:] if argv is None else argv)]
    )
    text = {
        "command": command,
        "machine": about,
        "model": MODEL,
        "repeats": args.repeats,
        "seconds": found,
    }
    write_json(args.out / "service-times-cpu.json", text)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
