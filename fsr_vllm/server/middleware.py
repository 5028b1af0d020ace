"""Pure ASGI middleware: a budget by request header, kept/total by response header, no body."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fsr_vllm import adaptive
from fsr_vllm.server import misplaced
from fsr_vllm.server.fields import BUDGET_HEADER
from fsr_vllm.server.report import RequestReport, current_report

TOKENS_HEADER = b"x-fsr-visual-tokens"
EXPOSE_HEADER = b"access-control-expose-headers"
ADAPTIVE_HEADER = b"x-fsr-adaptive"
# Ends of paths that are answered without the engine: however many of these there are, they are no
# load.
WITHOUT_ENGINE = ("/tokenize", "/detokenize", "/render", "/derender", "/count_tokens")


class FsrMiddleware:
    """Opens a report for each HTTP request, which is full before the response starts."""

    def __init__(self, app: ASGIApp) -> None:
        """`app` is what answers, vLLM's own middleware included."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, between its report's opening and its closing."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = [
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]
        ]
        budgets = [value for name, value in headers if name == BUDGET_HEADER]
        report = RequestReport(
            header=", ".join(budgets) if budgets else None,
            wrong_header=misplaced.in_headers(name for name, _ in headers),
            by_middleware=True,
        )
        # A page of another origin reads only the headers that the answer names; vLLM's CORS
        # middleware names none.
        foreign = any(name == "origin" for name, _ in headers)

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start" and report.total:
                value = f"{report.kept}/{report.total}".encode()
                added = [(TOKENS_HEADER, value)]
                if report.adaptive is not None:
                    added.append((ADAPTIVE_HEADER, str(report.adaptive).encode()))
                if foreign:
                    added.append((EXPOSE_HEADER, b", ".join(name for name, _ in added)))
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        # A variable of this task and its children: the endpoint, and whatever vLLM starts for it,
        # see the same report.
        token = current_report.set(report)
        # Load is counted once the body is there and means work (`RequestReport.count`): a socket
        # that is held open and sends nothing costs its client nothing, and must not steer what
        # others get.
        if scope.get("method") == "POST" and not scope.get("path", "").endswith(WITHOUT_ENGINE):
            report.monitor = adaptive.active()
        try:
            await self.app(scope, receive, send_with_header)
        finally:
            current_report.reset(token)
            report.close()
