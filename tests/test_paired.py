"""The statistics of `benchmarks.serving.paired`, and the load it sends; servers are not started."""

from __future__ import annotations

import asyncio
import base64
import io
import json

import aiohttp
import pytest
from aiohttp import web
from PIL import Image

from benchmarks.serving.analysis import BASE, CONTROL, OFF, compare, interval, markdown, save, voids
from benchmarks.serving.load import Pictures, ask, at_once, body, figures, questions
from benchmarks.serving.options import ARMS, arguments, opened
from benchmarks.serving.servers import memory

PROMPTS = {BASE: 604, CONTROL: 604, OFF: 604, "64": 92, "64, new question": 93, "128": 156}


def blocks(ttft, rounds=6, later=None, prompts=PROMPTS):
    """Blocks at one at a time: TTFT of each arm, times a factor that drifts from round to round."""
    return [
        {
            "run": 1, "round": number, "concurrency": 1, "arm": arm, "requests": 8,
            "prompt_tokens": prompts[arm], "ttft_ms": value * (1 + number / 10),
            "later_token_ms": (later or {}).get(arm, 7.0), "requests_per_second": 1.0,
        }
        for number in range(rounds)
        for arm, value in ttft.items()
    ]  # fmt: skip


def found(records, arm, key="ttft_ms"):
    return next(r for r in records if (r["arm"], r["figure"]) == (arm, key))


def test_a_drift_of_the_machine_is_no_difference_of_arms():
    records = compare(blocks({BASE: 50.0, CONTROL: 50.0, "64": 40.0}))
    assert found(records, "64")["percent"] == pytest.approx(-20)
    assert found(records, "64")["interval"] == pytest.approx((-20, -20))
    assert found(records, CONTROL)["interval"] == pytest.approx((0, 0))


def test_a_block_without_its_partner_or_with_an_error_counts_for_nothing():
    data = blocks({BASE: 50.0, "64": 40.0}, rounds=5)
    data[0] |= {"error": "500"}  # vanilla's of round 0
    del data[5]["ttft_ms"]  # the other arm's of round 2
    assert found(compare(data), "64")["pairs"] == 3
    assert found(compare(data), "64")["interval"] is None  # too few to say


def test_the_interval_holds_the_median_and_narrows():
    values = [float(v) for v in range(-5, 6)]
    low, high = interval(values)
    assert -5 <= low < 0 < high <= 5
    narrow = interval(values * 20)
    assert low < narrow[0] <= 0 <= narrow[1] < high


def test_a_control_that_differs_voids_its_own_figure_only():
    sound = blocks({BASE: 50.0, CONTROL: 50.0, OFF: 50.0, "64": 40.0})
    assert voids(sound) == {}
    off = voids(blocks({BASE: 50.0, CONTROL: 52.0, OFF: 50.0, "64": 40.0}))
    assert list(off) == [(1, "ttft_ms")]
    assert "+4.0 to +4.0 %" in off[1, "ttft_ms"]


@pytest.mark.parametrize("arm", [CONTROL, OFF])
def test_unequal_times_per_later_token_void_everything(arm):
    data = blocks({BASE: 50.0, CONTROL: 50.0, OFF: 50.0, "64": 40.0}, later={arm: 7.2})
    assert "time per later token" in voids(data)[None]
    fine = blocks({BASE: 50.0, CONTROL: 50.0, OFF: 50.0, "64": 40.0}, later={OFF: 7.1, "64": 6.0})
    assert None not in voids(fine)


def test_a_run_without_a_control_or_without_pruning_is_void():
    assert "control" in voids(blocks({BASE: 50.0, "64": 40.0}))[None]
    whole = PROMPTS | {"64": 604}
    data = blocks({BASE: 50.0, CONTROL: 50.0, "64": 40.0}, prompts=whole)
    assert voids(data)[None] == "the prompts of 64 have 604 tokens"
    cut = blocks({BASE: 50.0, CONTROL: 50.0, OFF: 50.0}, prompts=PROMPTS | {OFF: 92})
    assert "the prompts of off" in voids(cut)[None]


def test_a_report_is_written_and_read_again(tmp_path):
    given = ["--size", "tiny", "--out", str(tmp_path), "--resume"]
    args = arguments(given, "")
    data = opened(args, {"CPU": "a"}, "command")
    assert data["runs"] == 0
    data["blocks"] = blocks(dict.fromkeys(PROMPTS, 50.0))
    data["runs"] = 1
    data["servers"] = {"vanilla": {"options": ["--x"], "seconds": None, "error": "died\nof it"}}
    save(data, tmp_path / "paired-cpu.json")
    assert opened(args, {"CPU": "a"}, "command") == data | {"servers": {}}
    text = (tmp_path / "paired-cpu.md").read_text()
    assert "| 1 | 64 | 6 | +0.0 [+0.0, +0.0] |" in text
    assert "- vanilla: died; `--x`" in text
    with pytest.raises(SystemExit, match="another machine"):
        opened(args, {"CPU": "b"}, "command")
    with pytest.raises(SystemExit, match="other settings"):
        opened(arguments([*given, "--tokens", "9"], ""), {"CPU": "a"}, "command")
    assert opened(arguments(given[:-1], ""), {"CPU": "b"}, "command")["blocks"] == []


def test_an_empty_report_says_so(tmp_path):
    data = opened(arguments(["--out", str(tmp_path)], ""), {}, "command")
    assert "**Void: nothing was measured.**" in markdown(data)


def test_every_picture_and_question_is_a_new_one():
    pictures = Pictures(0)
    pictures.make(3)
    taken = pictures.take(12)
    assert len(set(taken)) == 12
    assert not len(pictures)
    url = json.loads(body(taken[0], "Why?", 4, {"fsr_budget": 64}))
    image = url["messages"][0]["content"][0]["image_url"]["url"]
    assert image.encode() == taken[0]
    assert url["fsr_budget"] == 64
    asked = [question for question, _ in zip(questions(0), range(50), strict=False)]
    assert len(set(asked)) == 50
    assert {len(question.split()) for question in asked} == {8}

    assert Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).size == (336, 336)


def test_three_servers_share_a_large_card_and_two_a_smaller_one():
    assert memory("7b", 143771, 3)[1] is False
    assert memory("7b", 81559, 3)[1] is True
    assert memory("7b", 81559, 2)[1] is False
    assert memory("tiny", 0, 3)[1] is False


async def served(handler, action):
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        return await action(f"http://127.0.0.1:{runner.addresses[0][1]}")
    finally:
        await runner.cleanup()


def stream(*chunks):
    async def handler(request):
        response = web.StreamResponse()
        await response.prepare(request)
        for chunk in chunks:
            await response.write(b"data: " + json.dumps(chunk, separators=(",", ":")).encode())
            await response.write(b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    return handler


SPEAKS = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
TOKEN = {"choices": [{"delta": {"content": "a"}}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 92, "completion_tokens": 2}}


def test_the_client_counts_tokens_and_refuses_half_an_answer():

    async def one(root):
        async with aiohttp.ClientSession() as session:
            return await ask(session, root, b"{}")

    answer = asyncio.run(served(stream(SPEAKS, TOKEN, TOKEN, USAGE), one))
    assert (answer.prompt, answer.tokens) == (92, 2)
    assert 0 < answer.first <= answer.last
    for chunks in ((SPEAKS, TOKEN), (SPEAKS, USAGE)):
        with pytest.raises(RuntimeError, match="ended early"):
            asyncio.run(served(stream(*chunks), one))


def test_as_many_as_asked_are_on_their_way_and_an_error_ends_a_block():
    now, most = 0, 0

    async def slow(request):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return await stream(SPEAKS, TOKEN, TOKEN, USAGE)(request)

    answers = asyncio.run(served(slow, lambda root: at_once(root, [b"{}"] * 10, 4)))
    assert len(answers) == 10
    assert most == 4
    assert figures(answers, 2.0)["requests_per_second"] == 5

    async def refuse(request):
        return web.Response(status=400, text="no such field")

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(served(refuse, lambda root: at_once(root, [b"{}"] * 3, 2)))
    assert "400: no such field" in str(caught.value.exceptions[0])


def test_every_arm_has_a_server():
    assert {server for server, _, _ in ARMS.values()} == {"vanilla", "again", "plugin"}
