"""The ASGI middleware alone: headers in and out, bodies untouched, all else passed on."""

import asyncio

import pytest

from fsr_vllm import adaptive
from fsr_vllm.server.middleware import FsrMiddleware
from fsr_vllm.server.report import current_report


def call(app, headers=(), kind="http", method="POST", path="/v1/chat/completions"):
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "method": method, "path": path, "headers": list(headers)}
    asyncio.run(FsrMiddleware(app)(scope, receive, send))
    return sent


async def answer(send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": b"x"})


def test_the_report_becomes_a_header():
    async def app(scope, receive, send):
        report = current_report.get()
        assert report.header == "64"
        report.kept, report.total = 64, 576
        await answer(send)

    sent = call(app, [(b"x-fsr-budget", b"64"), (b"host", b"h")])
    assert sent[0]["headers"] == [(b"a", b"b"), (b"x-fsr-visual-tokens", b"64/576")]
    assert sent[1] == {"type": "http.response.body", "body": b"x"}


def test_nothing_to_report_changes_nothing():
    async def app(scope, receive, send):
        assert current_report.get().header is None
        await answer(send)

    assert call(app)[0]["headers"] == [(b"a", b"b")]


def test_a_report_belongs_to_one_request():
    async def app(scope, receive, send):
        await asyncio.sleep(0)
        report = current_report.get()
        report.kept = report.total = int(report.header)
        await answer(send)

    async def both():
        results = []
        for value in (b"1", b"2"):
            sent = []

            async def send(message, sent=sent):
                sent.append(message)

            results.append(
                (
                    sent,
                    FsrMiddleware(app)(
                        {"type": "http", "headers": [(b"x-fsr-budget", value)]}, None, send
                    ),
                )
            )
        await asyncio.gather(*(task for _, task in results))
        return [sent[0]["headers"][-1][1] for sent, _ in results]

    assert asyncio.run(both()) == [b"1/1", b"2/2"]
    assert current_report.get() is None


def test_other_protocols_pass():
    async def app(scope, receive, send):
        assert current_report.get() is None
        await send({"type": "websocket.accept"})

    assert call(app, kind="websocket") == [{"type": "websocket.accept"}]


def test_the_budget_that_the_load_gave_is_a_header_too():
    async def app(scope, receive, send):
        report = current_report.get()
        report.kept, report.total, report.adaptive = 106, 576, 106
        await answer(send)

    assert call(app)[0]["headers"][-1] == (b"x-fsr-adaptive", b"106")


@pytest.mark.parametrize("fails", [False, True])
def test_requests_are_load_from_their_parsed_body_to_their_answer(monkeypatch, fails):
    monitor = adaptive.LoadMonitor(64, 288)
    monkeypatch.setattr(adaptive, "_active", monitor)
    seen = []

    async def app(scope, receive, send):
        seen.append(monitor.load().waiting)  # the body may never come
        await receive()
        for _ in range(2):  # the model was checked, then the conversation is rendered
            current_report.get().count()
            seen.append(monitor.load().waiting)
        if fails:
            raise RuntimeError("gone")
        await answer(send)

    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("GET", "/health"),
        *(("POST", p) for p in NO_LOAD),
    ):
        seen.clear()
        try:
            call(app, method=method, path=path)
        except RuntimeError:
            assert fails
        assert seen == ([0, 1, 1] if path == "/v1/chat/completions" else [0, 0, 0]), path
        assert monitor.load().waiting == 0


NO_LOAD = (
    "/tokenize",
    "/detokenize",
    "/v1/chat/completions/render",
    "/v1/messages/render",
    "/v1/messages/count_tokens",
    "/behind/a/proxy/tokenize",
)
