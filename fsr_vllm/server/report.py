"""One HTTP request as the plugin sees it: what it asked for, and what became of its images."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from fsr_vllm.adaptive import LoadMonitor
from fsr_vllm.params import Budget, FieldError, FsrRequest, Total


@dataclass
class RequestReport:
    """What is known of one HTTP request, from its headers to its answer."""

    header: str | None = None  # of the budget, as written
    wrong_header: FieldError | None = None  # why a header that looks like ours is none
    alias: Budget | Total | None = None  # the budget behind the model's name
    written: dict[str, Any] = field(default_factory=dict)  # fsr_* of the body
    asked: FsrRequest | None = None  # all of these together, validated
    name: str = ""  # what the client called the first of them
    searched: bool = False  # the whole body was searched for misplaced fields
    kept: int = 0
    total: int = 0
    adaptive: int | None = None  # the budget that the load gave images the request named none for
    monitor: LoadMonitor | None = None  # of the load, where this request can become part of it
    counted: bool = False
    by_middleware: bool = False  # false where requests come without HTTP, as in run-batch

    def count(self) -> None:
        """From now on the request is load: its body is parsed, and its model is served here."""
        if self.monitor is not None and not self.counted:
            self.counted = True
            self.monitor.enter()

    def close(self) -> None:
        """The request was answered, or went away."""
        if self.monitor is not None and self.counted:
            self.monitor.leave()


# Of the task that serves one request: endpoints check the model and render in the same one.
current_report: ContextVar[RequestReport | None] = ContextVar("fsr_report", default=None)


def begun() -> RequestReport:
    """The report of this task's request; a new one where no middleware has opened any."""
    report = current_report.get()
    if report is None or not report.by_middleware:
        report = RequestReport()
        current_report.set(report)
    return report
