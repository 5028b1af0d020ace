"""Pure ASGI middleware: the budget in by request header, kept/total out by response header. It never reads a body."""

from __future__ import annotations

from typing import Any

from fsr_vllm import adaptive
from fsr_vllm.server import misplaced
from fsr_vllm.server.requests import RequestReport, current_report

BUDGET_HEADER = b"x-fsr-budget"
TOKENS_HEADER = b"x-fsr-visual-tokens"
EXPOSE_HEADER = b"access-control-expose-headers"
ADAPTIVE_HEADER = b"x-fsr-adaptive"


class FsrMiddleware:
    """Opens a report for each HTTP request; the renderer hook fills it before the response starts."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = [value.decode("latin-1") for name, value in scope["headers"] if name == BUDGET_HEADER]
        report = RequestReport(budget_header=", ".join(headers) if headers else None)
        report.wrong_header = misplaced.in_headers(name.decode("latin-1") for name, _ in scope["headers"])
        # A page of another origin reads only the headers that the answer names; vLLM's CORS middleware names none.
        foreign = any(name == b"origin" for name, _ in scope["headers"])

        async def send_with_header(message: Any) -> None:
            if message["type"] == "http.response.start" and report.total:
                value = f"{report.kept}/{report.total}".encode()
                added = [(TOKENS_HEADER, value)]
                if report.adaptive is not None:
                    added.append((ADAPTIVE_HEADER, str(report.adaptive).encode()))
                if foreign:
                    added.append((EXPOSE_HEADER, b", ".join(name for name, _ in added)))
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        # A variable of this task and its children: the endpoint, and whatever vLLM starts for it, see the same report.
        token = current_report.set(report)
        # Work comes by POST; probes of health and metrics are no load.
        monitor = adaptive.active() if scope.get("method") == "POST" else None
        if monitor is not None:
            monitor.enter()
        try:
            await self.app(scope, receive, send_with_header)
        finally:
            current_report.reset(token)
            if monitor is not None:
                monitor.leave()
