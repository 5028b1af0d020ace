"""One stage of `make compat`, run by the Python of the environment under test; fails with what is
wrong.

Usage: python compat_smoke.py offline|scheduler|http FOLDER. The small random model is written to
FOLDER once, for all versions.
"""

import http.client
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.testbed import build_checkpoint, data_url, photos
from fsr_vllm.demo import ENVIRONMENT, MODEL_NAME, SERVE_OPTIONS, serve

ROOT = Path(__file__).resolve().parent.parent
TOTAL, BUDGET = 576, 64


def model_in(folder: Path) -> Path:
    if not (folder / "model" / "config.json").exists():
        build_checkpoint(folder / "model")
    return folder / "model"


def check(holds: bool, what: str, *seen: Any) -> None:
    if not holds:
        raise AssertionError(f"{what}: {', '.join(map(repr, seen))}")


# --- offline --------------------------------------------------------------------------------------


def offline(folder: Path) -> None:
    """Stock vLLM and the plugin in an engine each: unpruned alike, pruned to the budget, a bad
    budget refused.
    """
    model = model_in(folder)
    plain, text = ask(), {"parts": ["Name a colour."]}
    stock = engine(model, {}, [[plain], [text]], VLLM_PLUGINS="none")["results"]
    talk = {"chat": [[["user", "chelsea", "What is this?"]]], "fields": {"fsr_budget": BUDGET}}
    steps = {
        "plain": [plain],
        "off": [ask(fsr_budget="off")],
        "pruned": [ask(fsr_budget=BUDGET)],
        "refused": [ask(fsr_budget=0)],
        "text": [text],
        "chat": talk,
        "mixed": [ask(fsr_budget=32, fsr_method="cdpruner"), text, ask(fsr_budget=BUDGET), plain],
    }
    report = engine(model, {"additional_config": {"fsr": {}}}, list(steps.values()))
    active = dict(zip(steps, report["results"], strict=True))
    expected, words = answer(stock[0]), answer(stock[1])
    pruned, mixed = answer(active["pruned"]), active["mixed"]
    same(answer(active["plain"]), expected, "an answer without fields", "stock vLLM's")
    same(answer(active["off"]), expected, 'an answer with fsr_budget "off"', "stock vLLM's")
    same(answer(active["text"]), words, "an answer to text alone", "stock vLLM's")
    counted(pruned, expected, BUDGET)
    check(len(pruned["tokens"]) > 0, "a pruned request's answer", pruned["tokens"])
    refusal = active["refused"]
    check(
        "error" in refusal and "fsr_budget" in refusal["error"],
        "the refusal of a budget of 0",
        refusal,
    )
    check("ValueError" in refusal["type"], "its class", refusal["type"])
    check(
        answer(active["chat"])["visual"] == [BUDGET, TOTAL],
        "kept and total of LLM.chat",
        active["chat"],
    )
    check(len(mixed) == 4, "a batch of four was expected", mixed)
    counted(mixed[0], expected, 32)
    same(mixed[1], words, "text in a mixed batch", "stock vLLM's")
    same(mixed[2], pruned, "a pruned answer in a mixed batch", "the one alone")
    same(mixed[3], expected, "an unpruned answer in a mixed batch", "stock vLLM's")
    # One picture in all requests: preprocessed once, and encoded once, whatever was asked about it.
    stats, worker = report["stats"], report["stats"]["workers"][0]
    check(stats["preprocessed_images"] == 1, "images preprocessed", stats)
    check(worker["tower_images"] == 1, "images through the vision tower", worker)


def counted(pruned: dict[str, Any], unpruned: dict[str, Any], budget: int) -> None:
    left = pruned["prompt"] - (unpruned["prompt"] - TOTAL)
    check(left == budget, f"placeholders of a budget of {budget}", left)
    check(pruned["visual"] == [budget, TOTAL], "kept and total", pruned["visual"])


def ask(**fields: Any) -> dict[str, Any]:
    return {"parts": ["chelsea", "What is this?"], **({"fields": fields} if fields else {})}


def engine(
    model: Path, options: dict[str, Any], steps: list[Any], **environment: str
) -> dict[str, Any]:
    """What tests/engine/offline.py reports of the steps; it is the one script that the engine tests
    use, too.
    """
    with tempfile.TemporaryDirectory() as scratch:
        spec, out = Path(scratch) / "spec.json", Path(scratch) / "out.json"
        spec.write_text(json.dumps({"llm": {"model": str(model), **options}, "steps": steps}))
        script = ROOT / "tests" / "engine" / "offline.py"
        subprocess.run(
            [sys.executable, script, spec, out], env={**os.environ, **environment}, check=True
        )
        return json.loads(out.read_text())


def answer(step: Any) -> dict[str, Any]:
    check(isinstance(step, list), "an answer was expected", step)
    return step[0]


def same(left: dict[str, Any], right: dict[str, Any], what: str, whose: str) -> None:
    for key in ("prompt", "tokens"):
        check(
            left[key] == right[key], f"{key} of {what} differ from {whose}", left[key], right[key]
        )
    apart = max(abs(a - b) for a, b in zip(left["logprobs"], right["logprobs"], strict=True))
    check(apart < 1e-4, f"log-probabilities of {what} differ from {whose} by", apart)


# --- scheduler ------------------------------------------------------------------------------------


def scheduler(folder: Path) -> None:
    """VLLM's real scheduler, without an engine: a step encodes no more at a budget of 1 than
    unpruned.
    """
    sys.path.insert(0, str(ROOT))
    from tests.compat.scheduling import make_request, make_scheduler, run, work

    model, step = model_in(folder), 2048

    def many() -> Any:
        return make_request("many", [(seed, 1, TOTAL) for seed in range(900)])

    steps = run(make_scheduler(model, {}, max_num_batched_tokens=step), [many()])
    check(max(work(steps)) <= step, "unpruned tokens in a step", max(work(steps)))
    check(
        [place for one in steps for _, place, *_ in one] == list(range(900)),
        "each image once, in order",
    )
    plain = run(make_scheduler(model, None, max_num_batched_tokens=step), [many()])
    check(max(map(len, plain)) > step // TOTAL, "a check that could not fail", max(map(len, plain)))


# --- http -----------------------------------------------------------------------------------------


def http_side(folder: Path) -> None:
    """A server with a default budget: the budget by every way in, the count in the header, a bad
    budget is a 400.
    """
    options = (
        *SERVE_OPTIONS,
        "--fsr-budget",
        "128",
        "--fsr-max-budget",
        "500",
        "--fsr-model-alias",
    )
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        try:
            with serve(str(model_in(folder)), log, options, ENVIRONMENT) as url:
                ask_server(url)
        finally:
            if log.exists():
                print(log.read_text(errors="replace"))


def ask_server(url: str) -> None:
    chat = f"{url}/chat/completions"
    whole = kept(chat, 128, "--fsr-budget")["usage"]["prompt_tokens"]
    saved = whole - kept(chat, BUDGET, "fsr_budget", fsr_budget=BUDGET)["usage"]["prompt_tokens"]
    check(saved == 128 - BUDGET, "prompt tokens saved", saved)
    kept(chat, 32, "the header", headers={"x-fsr-budget": "32"})
    kept(chat, 16, "the model's name", model=f"{MODEL_NAME}@fsr16")
    kept(f"{url}/messages", 24, "an Anthropic body", image=anthropic_image(), fsr_budget=24)
    kept(chat, 144, "a share", fsr_budget=0.25)
    for wrong in (0, "64", 501, "off"):  # the last two: above --fsr-max-budget
        status, _, body = post(chat, fsr_budget=wrong)
        check(status == 400, f"status of a request with fsr_budget {wrong!r}", status, body)
        check(body["error"]["param"] == "fsr_budget", "param of its error", body)
    status, headers, body = post(chat, headers={"x-fsr-budget": "0"})
    check(status == 400, "status of a request with a budget of 0 in the header", status, body)
    status, headers, body = post(chat, text_only=True, fsr_budget=BUDGET)
    check(status == 200, "status of a request without images", status, body)
    check(
        headers["x-fsr-visual-tokens"] is None,
        "its header x-fsr-visual-tokens",
        headers["x-fsr-visual-tokens"],
    )


def kept(url: str, budget: int, way: str, **request: Any) -> Any:
    """The answer's body, after checks of status and header."""
    status, headers, body = post(url, **request)
    check(status == 200, f"status of a request with a budget by {way}", status, body)
    tokens = headers["x-fsr-visual-tokens"]
    check(tokens == f"{budget}/{TOTAL}", f"header x-fsr-visual-tokens of a budget by {way}", tokens)
    return body


def openai_image() -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(photos()["chelsea"])}}


def anthropic_image() -> dict[str, Any]:
    kind, _, data = data_url(photos()["chelsea"]).removeprefix("data:").partition(";base64,")
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}


def post(
    url: str,
    image: Any = None,
    text_only: bool = False,
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> tuple[int, http.client.HTTPMessage, Any]:
    content = [{"type": "text", "text": "What is this?"}]
    if not text_only:
        content.insert(0, image or openai_image())
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
    }
    data = json.dumps({**body, **fields}).encode()
    request = urllib.request.Request(
        url, data, {"Content-Type": "application/json", **(headers or {})}
    )
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # the server is on this machine
    try:
        response = opener.open(request, timeout=300)
    except urllib.error.HTTPError as error:
        response = error  # also an answer
    with response:
        return response.status, response.headers, json.load(response)


if __name__ == "__main__":
    stages = {"offline": offline, "scheduler": scheduler, "http": http_side}
    stages[sys.argv[1]](Path(sys.argv[2]))
