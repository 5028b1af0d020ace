"""The one way from a route of ours to the workers: no number of clients can hold up the engine.

A worker answers between two steps of the engine, so each question delays everybody's next token. At
most one is under way per API server, few wait for it, and the rest are sent away with 503. Pure
asyncio; it knows neither vLLM nor HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

Answer: TypeAlias = Any  # whatever the workers' method returns

QUEUE = 8  # questions that may wait for the one under way
TIMEOUT_SECONDS = 5.0  # a caller's patience, waiting included
SHARED_SECONDS = 1.0  # how long an answer to a question without arguments serves everybody


class Unavailable(Exception):
    """The workers cannot be asked now."""

    def __init__(self, message: str, retry_after: int | None) -> None:
        """`retry_after` (seconds) says when to come again, None: never."""
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(eq=False)
class _Question:
    """One call to the workers and those who wait for its answer."""

    task: asyncio.Task[Answer] | None = None
    callers: int = 0
    dropped: bool = False  # its callers had gone before it was sent
    sent_at: float | None = None
    answered_at: float | None = None


class WorkerGate:
    """Asks workers by `call(method, args)`, one question at a time, and never once `dead()`.

    Only questions without arguments share an answer: while it is under way and for a second after
    it. A question whose callers have all gone before it was sent is dropped; one that was sent is
    waited for, whoever has gone, and until a late answer has come nothing else is sent.
    """

    def __init__(
        self,
        call: Callable[[str, tuple[object, ...]], Awaitable[Answer]],
        dead: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        """`call` reaches the workers, `dead` says that nobody will answer any more."""
        self._call, self.dead, self._clock, self._timeout = call, dead, clock, timeout
        self._turn = asyncio.Lock()
        self._shared: dict[str, _Question] = {}
        self._sent: _Question | None = None
        self._waiting = 0
        self.counts = {"sent": 0, "shared": 0, "refused": 0, "late": 0}

    async def ask(self, method: str, *args: object) -> Answer:
        """The workers' answer. Errors: Unavailable, or whatever the call itself raised."""
        self._check_engine()
        question = None if args else self._shared.get(method)
        if question is not None and self._serves(question):
            self.counts["shared"] += 1
        else:
            question = self._enqueue(method, args)
        return await self._answer(question)

    def _check_engine(self) -> None:
        if self.dead():
            self.counts["refused"] += 1
            raise Unavailable("the engine has died; this server is about to stop", None)

    def _serves(self, question: _Question) -> bool:
        if question.answered_at is not None:
            return self._clock() - question.answered_at < SHARED_SECONDS
        return not (question.dropped or self._is_late(question))

    def _is_late(self, question: _Question | None) -> bool:
        return (
            question is not None
            and question.sent_at is not None
            and question.answered_at is None
            and self._clock() - question.sent_at >= self._timeout
        )

    def _enqueue(self, method: str, args: tuple[object, ...]) -> _Question:
        if self._is_late(self._sent):
            self._refuse("the workers are late with an earlier answer", round(self._timeout))
        if self._waiting >= QUEUE + (not self._turn.locked()):
            self._refuse(f"{QUEUE} questions to the workers are waiting already", 1)
        question = _Question()
        question.task = asyncio.create_task(self._run(question, method, args))
        # Somebody may have gone before it failed; asyncio would log an error that nobody asked for.
        question.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        if not args:
            self._shared[method] = question
        self._waiting += 1
        question.task.add_done_callback(lambda _: self._left_queue(question))
        return question

    def _refuse(self, message: str, retry_after: int) -> None:
        self.counts["refused"] += 1
        raise Unavailable(f"{message}; try again later", retry_after)

    def _left_queue(self, question: _Question) -> None:
        if question.sent_at is None:  # dropped while it waited
            self._waiting -= 1

    async def _run(self, question: _Question, method: str, args: tuple[object, ...]) -> Answer:
        async with self._turn:
            self._check_engine()
            self._waiting -= 1
            question.sent_at, self._sent = self._clock(), question
            self.counts["sent"] += 1
            try:
                return await self._call(method, args)
            finally:
                question.answered_at, self._sent = self._clock(), None

    async def _answer(self, question: _Question) -> Answer:
        task = question.task
        assert task is not None
        question.callers += 1
        try:
            return await asyncio.wait_for(asyncio.shield(task), self._timeout)
        except TimeoutError:
            if task.done() and not task.cancelled() and task.exception() is not None:
                raise  # the call's own
            self._check_engine()
            self.counts["late"] += 1
            raise Unavailable(
                f"no answer of the workers within {self._timeout:g} s", round(self._timeout)
            ) from None
        finally:
            question.callers -= 1
            if not question.callers and question.sent_at is None:
                question.dropped = True
                task.cancel()
