"""The default budget that follows the load: its range, its levels, the rule, and what one process
knows.
"""

import asyncio
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsr_vllm import adaptive
from fsr_vllm.adaptive import (
    LEVELS,
    STALE_SECONDS,
    AdaptiveBudget,
    Load,
    LoadMonitor,
    Rule,
    budget_levels,
)
from fsr_vllm.params import FieldError, ServerSettings
from fsr_vllm.params.budget import parse_range
from fsr_vllm.server import FsrEndpointPlugin

RULE = Rule()
LOADS = st.builds(Load, st.integers(0, 300), st.integers(0, 2000), st.floats(0, 1))
BOUNDS = st.tuples(st.integers(1, 3000), st.integers(1, 3000)).map(sorted).map(tuple)
# No deadline: on a busy machine anything may take long.
SEARCH = settings(deadline=None, max_examples=60)
HISTORY = st.lists(st.tuples(st.floats(0.0, 40.0), LOADS), min_size=1, max_size=40)


# --- the option -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["64:288", " 64 : 288 ", "1:1", "64:64", "1:1000000"])
def test_ranges(value):
    low, high = parse_range(value, "f")
    assert (low, high) == tuple(int(part) for part in value.split(":"))


@pytest.mark.parametrize(
    "value",
    ["", "64", "64:", ":288", "288:64", "0:64", "-1:64", "64:1000001", "0.1:0.5", "a:b",
     "64:288:300", "٦:٧", True, 992, 64, [64, 288], {}],
)  # fmt: skip
def test_no_ranges(value):
    with pytest.raises(FieldError, match="LOW:HIGH") as error:
        ServerSettings.parse({"adaptive": value})
    assert error.value.field == "fsr.adaptive"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_budget": 65}, "64, below fsr.min_budget 65"),
        ({"max_budget": 287}, "288, above fsr.max_budget 287"),
        ({"max_budget": 32}, "64, above fsr.max_budget 32"),
        ({"budget": 128}, "leave fsr.budget out"),
        ({"budget": "off"}, "leave fsr.budget out"),
    ],
)
def test_ranges_that_do_not_go_with_the_other_options(settings, words):
    with pytest.raises(FieldError, match=words) as error:
        ServerSettings.parse({"adaptive": "64:288", **settings})
    assert error.value.field == "fsr.adaptive"


def test_high_is_the_default_budget_and_the_range_travels_with_the_settings():
    settings = ServerSettings.parse({"adaptive": "64:288", "min_budget": 64, "max_budget": 288})
    settings = ServerSettings.from_json(settings.model_dump_json())
    assert settings.default_budget == 288
    assert settings.prunes_by_default
    assert settings.adaptive_range == (64, 288)
    assert ServerSettings.parse({"max_budget": 288}).adaptive_range is None


# --- levels and pressure --------------------------------------------------------------------------


@SEARCH
@given(BOUNDS)
def test_levels_are_few_and_within_the_range(bounds):
    low, high = bounds
    levels = budget_levels(low, high)
    assert levels[0] == high
    assert levels[-1] == low
    assert len(levels) <= LEVELS
    assert list(levels) == sorted(set(levels), reverse=True)


def test_levels_of_the_documented_range():
    assert budget_levels(64, 288) == (288, 174, 106, 64)


@SEARCH
@given(LOADS, st.integers(0, 500), st.floats(0, 1))
def test_pressure_never_falls_with_more_waiting_or_a_fuller_cache(load, more, fuller):
    least = RULE.pressure(load)
    assert 0 <= least <= LEVELS
    assert RULE.pressure(Load(load.running, load.waiting + more, load.kv_usage)) >= least
    assert RULE.pressure(Load(load.running, load.waiting, max(load.kv_usage, fuller))) >= least


def test_a_full_server_without_a_queue_is_no_pressure_but_a_full_cache_is():
    assert RULE.pressure(Load(running=256)) == 0
    assert RULE.pressure(Load(running=256, kv_usage=0.5)) == 0
    assert RULE.pressure(Load(running=256, kv_usage=1.0)) == LEVELS
    assert RULE.pressure(Load(running=0, waiting=12)) == LEVELS


# --- the rule over time ---------------------------------------------------------------------------


def follow(history, bounds=(64, 288), rule=RULE):
    """The budget after each (seconds since the one before, load)."""
    policy, now, found = AdaptiveBudget(*bounds, rule), 0.0, []
    for seconds, load in history:
        now += seconds
        found.append(policy.update(load, now))
    return found


@SEARCH
@given(HISTORY, BOUNDS)
def test_the_budget_stays_in_its_range_and_on_its_levels(history, bounds):
    assert set(follow(history, bounds)) <= set(budget_levels(*bounds))
    assert follow(history, bounds) == follow(history, bounds)


@SEARCH
@given(
    st.lists(
        st.tuples(st.floats(0, 40), LOADS, st.integers(0, 200), st.floats(0, 1)),
        min_size=1,
        max_size=40,
    )
)
def test_more_load_at_every_moment_never_means_more_tokens(history):
    less = follow([(seconds, load) for seconds, load, _, _ in history])
    more = follow(
        [
            (seconds, Load(load.running, load.waiting + waiting, max(load.kv_usage, usage)))
            for seconds, load, waiting, usage in history
        ]
    )
    assert all(a >= b for a, b in zip(less, more, strict=True))


@SEARCH
@given(HISTORY, LOADS, st.floats(0.5, 5.0))
def test_under_constant_load_it_turns_at_most_once_and_then_rests(before, load, step):
    rest = int((2 * LEVELS * RULE.hold_seconds + 60 * RULE.smooth_seconds) / step)
    found = follow([*before, *[(step, load)] * (2 * rest)])[len(before) :]
    moves = [b - a for a, b in zip(found, found[1:], strict=False) if a != b]
    turns = sum((a > 0) != (b > 0) for a, b in zip(moves, moves[1:], strict=False))
    assert turns <= 1
    assert len(set(found[rest:])) == 1


@SEARCH
@given(st.lists(st.tuples(st.floats(0.0, 5.0), LOADS), min_size=1, max_size=100))
def test_it_rises_at_most_a_level_per_hold(history):
    now, rises, found = 0.0, [], [288, *follow(history)]
    for (seconds, _), before, after in zip(history, found, found[1:], strict=False):
        now += seconds
        if after > before:
            rises.append(now)
    # What was due since the reading before comes late, by as much as that is old.
    assert all(
        b - a >= RULE.hold_seconds - 5.0 - 1e-9 for a, b in zip(rises, rises[1:], strict=False)
    )


def test_at_rest_it_is_high_and_a_queue_of_a_moment_changes_nothing():
    assert follow([(0.1, Load(running=8))] * 500) == [288] * 500
    blip = [(1.0, Load(8)), (1.0, Load(8, 100)), (0.02, Load(8)), *[(1.0, Load(8))] * 5]
    assert set(follow(blip)) == {288}


def test_a_queue_lowers_it_within_seconds_and_its_end_raises_it_one_level_at_a_time():
    crowded, calm = Load(8, 100), Load(2)
    found = follow([*[(0.1, crowded)] * 50, *[(0.1, calm)] * 900])
    assert found[0] == 288
    assert found[49] == 64
    rise = [index for index in range(50, 950) if found[index] != found[index - 1]]
    assert [found[index] for index in rise] == [106, 174, 288]
    gaps = [(b - a) * 0.1 for a, b in zip([50, *rise], rise, strict=False)]
    assert gaps == pytest.approx([RULE.hold_seconds] * 3, abs=3.0)


def test_a_pause_without_readings_counts_as_what_was_read_last():
    assert (
        follow([*[(0.1, Load(8, 100))] * 50, (0.1, Load()), (10 * RULE.hold_seconds, Load())])[-1]
        == 288
    )


def test_time_that_goes_back_is_no_time():
    policy = AdaptiveBudget(64, 288)
    policy.update(Load(0, 100), 10.0)
    assert policy.update(Load(0, 100), 5.0) == 288
    assert policy.update(Load(0, 100), 20.0) == 64


# --- one process ----------------------------------------------------------------------------------


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def monitor(now):
    return LoadMonitor(64, 288, clock=lambda: now[0])


def test_engines_add_up_and_the_fullest_cache_counts(monitor):
    monitor.read(0, Load(3, 1, 0.2))
    monitor.read(1, Load(4, 5, 0.9))
    assert monitor.load() == Load(7, 6, 0.9)
    monitor.read(1, Load(2, 0, 0.1))
    assert monitor.load() == Load(5, 1, 0.2)


def test_requests_of_this_process_that_do_not_run_wait(monitor):
    for _ in range(10):
        monitor.enter()
    assert monitor.load() == Load(0, 10)
    monitor.read(0, Load(4, 2))
    assert monitor.load() == Load(4, 6)
    for _ in range(10):
        monitor.leave()
    assert monitor.load() == Load(4, 2)


def test_old_figures_of_a_queue_are_forgotten(monitor, now):
    monitor.read(0, Load(4, 50, 0.99))
    now[0] += STALE_SECONDS + 1
    monitor.enter()
    assert monitor.load() == Load(4, 0)


def test_changes_are_reported(monitor, now):
    seen = []
    monitor.changed = lambda before, after: seen.append((before, after))
    monitor.read(0, Load(0, 100))
    now[0] += 5
    assert monitor.budget() == 64
    monitor.read(0, Load())
    now[0] += 1000
    assert monitor.budget() == 288
    assert seen == [(288, 64), (64, 288)]


def test_threads_lose_no_request(monitor):
    def work():
        for _ in range(2000):
            monitor.enter()
            monitor.budget()
            monitor.leave()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.load() == Load()


def test_the_monitor_of_a_process(monkeypatch):
    monkeypatch.setattr(adaptive, "_active", None)
    assert adaptive.default_budget(None) is None
    assert adaptive.default_budget((64, 288)) == 288
    assert adaptive.active() is None
    read = adaptive.start(64, 288)
    monitor = adaptive.active()
    read(0, 4, 2, 0.5)
    assert monitor.load() == Load(4, 2, 0.5)
    adaptive.start(64, 288)
    assert adaptive.active() is monitor
    adaptive.start(32, 288)
    assert adaptive.active() is not monitor
    assert adaptive.default_budget(None) is None


def test_a_server_without_an_engine_has_no_load_to_follow(monkeypatch):
    monkeypatch.setattr(adaptive, "_active", LoadMonitor(64, 288))
    with pytest.raises(RuntimeError, match="needs an engine"):
        asyncio.run(FsrEndpointPlugin().init_state(None, None, None))
