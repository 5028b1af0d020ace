"""A server whose default budget follows its load: full at rest, less when requests wait; what is
asked for stays.
"""

import asyncio
import contextlib
import socket
import time
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from benchmarks.testbed import build_checkpoint

from .conftest import KEY, NAME, embedded

pytestmark = pytest.mark.engine

WHAT = "What is this?"
RANGE = (16, 128)


@pytest.fixture(scope="module")
def server(start, tmp_path_factory):
    # Larger than other tests' models: steps of 3 ms leave vLLM's API server no time for anything
    # but reading outputs, and then neither /metrics nor a new request is answered before the crowd
    # has gone.
    checkpoint = build_checkpoint(tmp_path_factory.mktemp("adaptive"), hidden_size=512, layers=8)
    options = (
        "--fsr-adaptive",
        "{}:{}".format(*RANGE),
        "--fsr-detail-budgets",
        '{"low": 100}',
        "--max-num-seqs",
        "2",
        "--enable-mm-embeds",
    )
    with start("adaptive", checkpoint, *options) as server:
        yield server


def asked(server, detail="auto", **fields):
    """(x-fsr-visual-tokens, x-fsr-adaptive) of one short request."""
    messages = server.messages("chelsea", WHAT)
    messages[0]["content"][0]["image_url"]["detail"] = detail
    answer = server.post({"model": NAME, "messages": messages, "max_tokens": 1, **fields})
    assert answer.status_code == 200, answer.text
    return answer.headers["x-fsr-visual-tokens"], answer.headers.get("x-fsr-adaptive")


def test_only_images_without_a_mapped_detail_follow_the_load(server):
    messages = server.messages("chelsea", "rocket", WHAT)
    messages[0]["content"][0]["image_url"]["detail"] = "low"
    answer = server.post({"model": NAME, "messages": messages, "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-fsr-visual-tokens"] == "228/1152"
    assert answer.headers["x-fsr-adaptive"] == "128"


def test_embeddings_do_not_follow_the_load(server):
    answer = server.post(embedded(server, [200]))
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-fsr-visual-tokens"] == "200/200"
    assert "x-fsr-adaptive" not in answer.headers


def metrics(server):
    text = httpx.get(server.url.removesuffix("/v1") + "/metrics", timeout=60).text
    lines = (line.rpartition(" ") for line in text.splitlines() if line.startswith("fsr_adaptive"))
    return {name: float(value) for name, _, value in lines}


def test_at_rest_requests_get_high_and_may_ask_for_anything(server):
    assert asked(server) == ("128/576", "128")
    assert asked(server, detail="low") == ("100/576", None)
    for budget, kept in (
        (300, 300),
        (8, 8),
        ("off", 576),
    ):  # the range bounds the default, not requests
        assert asked(server, fsr_budget=budget) == (f"{kept}/576", None)
    found = metrics(server)
    assert found["fsr_adaptive_budget"] == 128
    assert found['fsr_adaptive_changes_total{direction="down"}'] == 0


@contextlib.contextmanager
def idle_sockets(server, count):
    """POSTs that announce a body and never send it."""
    place = urlsplit(server.url)
    head = f"POST {place.path}/chat/completions HTTP/1.1\r\nhost: {place.netloc}\r\n"
    head += f"authorization: Bearer {KEY}\r\n"
    head += "content-type: application/json\r\ncontent-length: 1000\r\n\r\n{"
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(
                socket.create_connection((place.hostname, place.port), timeout=60)
            )
            connection.sendall(head.encode())
        yield


def test_sockets_that_send_no_body_and_work_without_the_engine_are_no_load(server):
    messages = server.messages("chelsea", WHAT)
    with idle_sockets(server, 60):
        time.sleep(3)  # the load is smoothed over one second
        assert metrics(server)["fsr_adaptive_budget"] == RANGE[1]
        assert asked(server) == ("128/576", "128")
        assert server.post({"model": NAME, "messages": messages}, "/tokenize").json()["count"] > 128
    assert asked(server) == ("128/576", "128")
    assert metrics(server)['fsr_adaptive_changes_total{direction="down"}'] == 0


def test_under_load_the_default_falls_and_what_was_asked_for_stays(server):
    found, lowest = asyncio.run(crowded(server))
    assert lowest == RANGE[0]
    assert found == [("16/576", "16"), ("100/576", None), ("300/576", None)]
    assert metrics(server)['fsr_adaptive_changes_total{direction="down"}'] >= 1
    assert "Traceback" not in server.log.read_text()


async def crowded(server):
    """Three short requests while many long ones wait, and the lowest default budget seen before
    them.
    """
    url, headers = f"{server.url}/chat/completions", {"authorization": f"Bearer {KEY}"}
    long = {
        "model": NAME,
        "max_tokens": 1500,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": "Go on"}],
    }
    async with httpx.AsyncClient(headers=headers, timeout=None) as client:
        crowd = [asyncio.create_task(client.post(url, json=long)) for _ in range(24)]
        deadline, lowest = time.monotonic() + 60, float(RANGE[1])
        while lowest > RANGE[0] and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            lowest = (await asyncio.to_thread(metrics, server))["fsr_adaptive_budget"]
        asking = [
            asyncio.create_task(asyncio.to_thread(asked, server, detail, **fields))
            for detail, fields in (("auto", {}), ("low", {}), ("auto", {"fsr_budget": 300}))
        ]
        await asyncio.sleep(
            2
        )  # their budgets are settled now; they wait behind the others, which go away
        for task in crowd:
            task.cancel()
        return [await answer for answer in asking], lowest


def test_an_engine_that_dies_leaves_no_route_waiting_and_no_process_behind(server):
    """The last test of this server: its engine is killed."""
    assert server.get("/v1/fsr/stats")["workers"]
    port = urlsplit(server.url).port
    (pid,) = {
        c.pid
        for c in psutil.net_connections("tcp")
        if c.status == "LISTEN" and c.laddr.port == port
    }
    api_server = psutil.Process(pid)
    (engine,) = [
        child
        for child in api_server.children(recursive=True)
        if "EngineCore" in " ".join(child.cmdline())
    ]
    engine.kill()
    statuses = set()
    with contextlib.suppress(httpx.TransportError):  # until the server is gone
        while True:
            answer = httpx.get(
                f"{server.url}/fsr/stats", headers={"authorization": f"Bearer {KEY}"}, timeout=60
            )
            statuses.add(answer.status_code)
            if answer.status_code == 503:
                error = answer.json()["error"]
                assert error["code"] == 503
                assert error["param"] is None
    assert statuses <= {200, 503}
    assert 503 in statuses
    with contextlib.suppress(psutil.NoSuchProcess):
        while api_server.status() != psutil.STATUS_ZOMBIE:  # nobody has asked yet how it ended
            time.sleep(0.5)
