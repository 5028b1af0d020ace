"""The gate to the workers alone, before workers that answer when the test says so; and the route on
real servers.
"""

import asyncio
import contextlib
import threading
import time

import httpx
import pytest

from fsr_vllm.server.gate import QUEUE, SHARED_SECONDS, Unavailable, WorkerGate

from .conftest import KEY


class Workers:
    """Fake workers: every call waits for `answer`, and is noted."""

    def __init__(self, timeout=60.0):
        self.calls, self.open, self.most, self.dead, self.now = [], [], 0, False, 0.0
        self.gate = WorkerGate(self.call, lambda: self.dead, lambda: self.now, timeout)

    async def call(self, method, args):
        future = asyncio.get_running_loop().create_future()
        self.calls.append((method, *args))
        self.open.append(future)
        self.most = max(self.most, len(self.open))
        try:
            return await future
        finally:
            self.open.remove(future)

    def answer(self, value):
        (future,) = self.open
        if isinstance(value, Exception):
            future.set_exception(value)
        else:
            future.set_result(value)


async def settled():
    """Let everything that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


def asked(gate, *question):
    return asyncio.create_task(gate.ask(*question))


async def refused(gate, *question):
    with pytest.raises(Unavailable) as error:
        await gate.ask(*question)
    return error.value


def test_any_number_of_callers_share_one_answer_for_a_second():
    async def run():
        workers = Workers()
        tasks = [asked(workers.gate, "stats") for _ in range(500)]
        await settled()
        workers.answer("first")
        assert set(await asyncio.gather(*tasks)) == {"first"}
        workers.now += SHARED_SECONDS * 0.99
        assert await workers.gate.ask("stats") == "first"
        workers.now += SHARED_SECONDS * 0.02
        later = asked(workers.gate, "stats")
        await settled()
        workers.answer("second")
        assert await later == "second"
        assert workers.calls == [("stats",)] * 2
        assert workers.gate.counts == {"sent": 2, "shared": 500, "refused": 0, "late": 0}

    asyncio.run(run())


def test_questions_with_arguments_are_asked_one_by_one_in_order_and_share_nothing():
    async def run():
        workers = Workers()
        tasks = [
            asked(workers.gate, "explain", 1),
            asked(workers.gate, "explain", 1),
            asked(workers.gate, "stats"),
        ]
        for number in range(3):
            await settled()
            workers.answer(number)
        assert await asyncio.gather(*tasks) == [0, 1, 2]
        assert workers.most == 1
        assert workers.calls == [("explain", 1), ("explain", 1), ("stats",)]

    asyncio.run(run())


def test_beyond_the_queue_callers_are_told_to_come_again():
    async def run():
        workers = Workers()
        tasks = [asked(workers.gate, "explain", number) for number in range(1 + QUEUE + 5)]
        await settled()
        for task in tasks[1 + QUEUE :]:
            with pytest.raises(Unavailable, match="waiting") as error:
                await task
            assert error.value.retry_after == 1
        assert len(workers.calls) == 1
        assert workers.gate.counts["refused"] == 5
        workers.answer(0)
        await settled()
        tasks.append(asked(workers.gate, "explain", "again"))  # one place is free
        for _ in range(1 + QUEUE):
            await settled()
            workers.answer("later")
        assert await tasks[-1] == "later"
        assert workers.most == 1

    asyncio.run(run())


def test_while_an_answer_is_late_nothing_is_sent():
    async def run():
        workers = Workers(timeout=0.01)
        late = asked(workers.gate, "stats")
        waiting = asked(workers.gate, "explain", 1)
        for task in (late, waiting):
            with pytest.raises(Unavailable, match="within") as error:
                await task
            assert error.value.retry_after is not None
        workers.now += 1.0
        for question in (("stats",), ("explain", 2)):
            assert "late" in str(await refused(workers.gate, *question))
        await settled()
        assert workers.calls == [("stats",)]  # and the one that waited has been dropped
        assert workers.gate.counts == {"sent": 1, "shared": 0, "refused": 2, "late": 2}
        workers.answer("at last")
        await settled()
        assert (
            await workers.gate.ask("stats") == "at last"
        )  # that it was late does not make it wrong
        again = asked(workers.gate, "explain", 3)
        await settled()
        workers.answer("new")
        assert await again == "new"
        assert workers.most == 1

    asyncio.run(run())


def test_clients_that_go_away_take_nothing_with_them():
    async def run():
        workers = Workers()
        first, other = asked(workers.gate, "stats"), asked(workers.gate, "stats")
        queued = [asked(workers.gate, "explain", number) for number in range(QUEUE)]
        await settled()
        for task in (first, *queued):
            task.cancel()
        await settled()
        kept = [
            asked(workers.gate, "explain", f"kept {number}") for number in range(QUEUE)
        ]  # all places are free
        await settled()
        workers.answer("for the other")
        assert await other == "for the other"
        for _ in kept:
            await settled()
            workers.answer("done")
        assert await asyncio.gather(*kept) == ["done"] * QUEUE
        assert workers.calls == [
            ("stats",),
            *(("explain", f"kept {number}") for number in range(QUEUE)),
        ]

    asyncio.run(run())


def test_a_question_that_all_its_callers_left_is_asked_anew():
    async def run():
        workers = Workers()
        running = asked(workers.gate, "explain", 1)
        await settled()
        gone = asked(workers.gate, "stats")
        await settled()
        gone.cancel()
        again = asked(workers.gate, "stats")
        for value in ("explained", "counted"):
            await settled()
            workers.answer(value)
        assert await running == "explained"
        assert await again == "counted"

    asyncio.run(run())


def test_a_call_that_fails_fails_for_its_callers_and_stops_nobody_else():
    async def run():
        workers = Workers()
        tasks = [
            asked(workers.gate, "stats"),
            asked(workers.gate, "stats"),
            asked(workers.gate, "explain", 1),
        ]
        await settled()
        workers.answer(AttributeError("no such method"))
        for task in tasks[:2]:
            with pytest.raises(AttributeError):
                await task
        with pytest.raises(
            AttributeError
        ):  # shared too: asking again and again would cost the engine as much
            await workers.gate.ask("stats")
        await settled()
        workers.answer("fine")
        assert await tasks[2] == "fine"

    asyncio.run(run())


def test_a_dead_engine_is_asked_nothing():
    async def run():
        workers = Workers(timeout=0.01)
        pending, waiting = asked(workers.gate, "stats"), asked(workers.gate, "explain", 1)
        await settled()
        workers.dead = True
        for question in (("stats",), ("explain", 2)):
            error = await refused(workers.gate, *question)
            assert error.retry_after is None
            assert "died" in str(error)
        for task in (pending, waiting):
            with pytest.raises(Unavailable, match="died"):
                await task
        assert workers.calls == [("stats",)]

    with contextlib.closing(
        asyncio.new_event_loop()
    ) as loop:  # and nothing is left that would be waited for
        loop.run_until_complete(run())
        left = asyncio.all_tasks(loop)
        [task.cancel() for task in left]
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))


# --- on a real server -----------------------------------------------------------------------------


@pytest.mark.engine
def test_clients_that_loop_over_statistics_cost_the_engine_one_answer_per_second(main):
    stop, answers = threading.Event(), []

    def loop():
        with httpx.Client(headers={"authorization": f"Bearer {KEY}"}, timeout=120) as client:
            while not stop.is_set():
                answers.append(client.get(f"{main.url}/fsr/stats"))

    before, started = main.get("/v1/fsr/stats")["worker_calls"], time.monotonic()
    threads = [threading.Thread(target=loop) for _ in range(8)]
    [thread.start() for thread in threads]
    try:
        while len(answers) < 50:
            time.sleep(0.1)
        raw = main.client.chat.completions.create(
            model="fsr-demo",
            messages=main.messages("chelsea", "What?"),
            max_tokens=20,
            extra_body={"ignore_eos": True},
        )
    finally:
        stop.set()
        [thread.join() for thread in threads]
    time.sleep(SHARED_SECONDS)  # what was shared is too old now: this one is sent
    sent = main.get("/v1/fsr/stats")["worker_calls"]["sent"] - before["sent"]
    assert raw.usage.completion_tokens == 20
    assert {answer.status_code for answer in answers} == {200}
    assert all(answer.json()["workers"] for answer in answers)
    assert 1 <= sent <= (time.monotonic() - started) / SHARED_SECONDS + 1
    assert len(answers) > sent
