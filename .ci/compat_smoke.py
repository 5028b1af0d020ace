"""One stage of `make compat`, run by the Python of the environment under test; fails with what is wrong.

Usage: python compat_smoke.py offline|http FOLDER. The small random model is written to FOLDER once, for all versions.
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

from fsr_vllm.demo import ENVIRONMENT, MODEL_NAME, serve
from fsr_vllm.testbed import build_checkpoint, data_url, photos

ROOT = Path(__file__).resolve().parent.parent
TOTAL, BUDGET = 576, 64


def model_in(folder: Path) -> Path:
    if not (folder / "model" / "config.json").exists():
        build_checkpoint(folder / "model")
    return folder / "model"


def check(holds: bool, what: str, *seen: Any) -> None:
    if not holds:
        raise AssertionError(f"{what}: {', '.join(map(repr, seen))}")


# --- offline ----------------------------------------------------------------------------------------------------------


def offline(folder: Path) -> None:
    """Stock vLLM and the plugin in an engine each: unpruned alike, pruned to the budget, a bad budget refused."""
    model = model_in(folder)
    plain = ask()
    (stock,) = engine(model, {}, [[plain]], VLLM_PLUGINS="none")
    steps = [[plain], [ask(fsr_budget="off")], [ask(fsr_budget=BUDGET)], [ask(fsr_budget=0)], [plain]]
    active = engine(model, {"additional_config": {"fsr": {}}}, steps)
    expected = answer(stock)
    for place in (0, 1, 4):  # the last one: after the refusal
        same(answer(active[place]), expected)
    pruned = answer(active[2])
    rest = expected["prompt"] - TOTAL
    check(pruned["prompt"] - rest == BUDGET, f"placeholders of a budget of {BUDGET}", pruned["prompt"] - rest)
    check(pruned["visual"] == [BUDGET, TOTAL], "kept and total", pruned["visual"])
    check(len(pruned["tokens"]) > 0, "a pruned request's answer", pruned["tokens"])
    refusal = active[3]
    check("error" in refusal and "fsr_budget" in refusal["error"], "the refusal of a budget of 0", refusal)
    check("ValueError" in refusal["type"], "its class", refusal["type"])


def ask(**fields: Any) -> dict[str, Any]:
    return {"parts": ["chelsea", "What is this?"], **({"fields": fields} if fields else {})}


def engine(model: Path, options: dict[str, Any], steps: list[Any], **environment: str) -> list[Any]:
    """What tests/engine/offline.py reports of each step; it is the one script that the engine tests use, too."""
    with tempfile.TemporaryDirectory() as scratch:
        spec, out = Path(scratch) / "spec.json", Path(scratch) / "out.json"
        spec.write_text(json.dumps({"llm": {"model": str(model), **options}, "steps": steps}))
        script = ROOT / "tests" / "engine" / "offline.py"
        subprocess.run([sys.executable, script, spec, out], env={**os.environ, **environment}, check=True)
        return json.loads(out.read_text())["results"]


def answer(step: Any) -> dict[str, Any]:
    check(isinstance(step, list), "an answer was expected", step)
    return step[0]


def same(left: dict[str, Any], right: dict[str, Any]) -> None:
    for key in ("prompt", "tokens"):
        check(left[key] == right[key], f"{key} of an unpruned answer differ from stock vLLM's", left[key], right[key])
    apart = max(abs(a - b) for a, b in zip(left["logprobs"], right["logprobs"], strict=True))
    check(apart < 1e-4, "log-probabilities of an unpruned answer differ from stock vLLM's by", apart)


# --- http -------------------------------------------------------------------------------------------------------------


def http_side(folder: Path) -> None:
    """A server: a budget in the body, the count in the answer's header, a bad budget answered with 400."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        try:
            with serve(str(model_in(folder)), log, environment=ENVIRONMENT) as url:
                ask_server(f"{url}/chat/completions")
        finally:
            if log.exists():
                print(log.read_text(errors="replace"))


def ask_server(url: str) -> None:
    status, headers, body = post(url, BUDGET)
    check(status == 200, f"status of a request with fsr_budget {BUDGET}", status, body)
    tokens = headers["x-fsr-visual-tokens"]
    check(tokens == f"{BUDGET}/{TOTAL}", "header x-fsr-visual-tokens", tokens)
    unpruned = post(url, "off")[2]["usage"]["prompt_tokens"]
    saved = unpruned - body["usage"]["prompt_tokens"]
    check(saved == TOTAL - BUDGET, "prompt tokens saved", saved)
    status, _, body = post(url, 0)
    check(status == 400, "status of a request with fsr_budget 0", status, body)
    check(body["error"]["param"] == "fsr_budget", "param of its error", body)


def post(url: str, budget: Any) -> tuple[int, http.client.HTTPMessage, Any]:
    picture = {"type": "image_url", "image_url": {"url": data_url(photos()["chelsea"])}}
    content = [picture, {"type": "text", "text": "What is this?"}]
    body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    data = json.dumps({**body, "temperature": 0, "fsr_budget": budget}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine
    try:
        response = opener.open(request, timeout=300)
    except urllib.error.HTTPError as error:
        response = error  # also an answer
    with response:
        return response.status, response.headers, json.load(response)


if __name__ == "__main__":
    stages = {"offline": offline, "http": http_side}
    stages[sys.argv[1]](Path(sys.argv[2]))
