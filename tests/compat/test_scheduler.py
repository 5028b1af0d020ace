"""The limit on the tower's work of a step, on vLLM's real scheduler; no engine, no weights."""

import random
from types import MappingProxyType, SimpleNamespace

import pytest

from fsr_vllm.compat.scheduler import EncoderGate
from fsr_vllm.demo import demo_model

from .scheduling import make_request, make_scheduler, run, work

STEP, N = 2048, 144
FIT = STEP // N


@pytest.fixture(scope="module")
def scheduler():
    """A function that makes schedulers of the bundled model, whose images have 144 tokens, with the
    plugin active.
    """

    def make(settings=MappingProxyType({}), **arguments):
        return make_scheduler(
            demo_model(), None if settings is None else dict(settings), **arguments
        )

    return make


def many(count, kept=1, name="many"):
    return make_request(name, [(f"{name} {seed}", kept, N) for seed in range(count)])


def largest(steps):
    return max(map(len, steps))


def test_vllms_scheduler_asks_as_the_gate_expects(scheduler):
    """`can_allocate` once per image, before its placeholders are charged; and the caller takes the
    third element of the step's result for what is left of its budget.
    """
    one, asked, budgets = scheduler(None), [], []
    allocate, step = one.encoder_cache_manager.can_allocate, one._try_schedule_encoder_inputs

    def noted(request, place, left, scheduled):
        asked.append((place, left))
        return allocate(request, place, left, scheduled)

    def dearer(request, computed, new, budget, *args, **kwargs):
        budgets.append(budget)
        result = step(request, computed, new, budget, *args, **kwargs)
        assert result[0]
        return (*result[:2], result[2] - 100, *result[3:])

    one.encoder_cache_manager.can_allocate, one._try_schedule_encoder_inputs = noted, dearer
    for name in "ab":
        one.add_request(many(2, kept=10, name=name))
    one.schedule()
    after = STEP - 20 - 100
    assert asked == [(0, STEP), (1, STEP - 10), (0, after), (1, after - 10)]
    assert budgets == [STEP, after]


@pytest.mark.parametrize("count", [300, 900])
def test_a_step_encodes_what_fits_unpruned_and_every_image_once(scheduler, count):
    steps = run(scheduler(), [many(count)])
    assert largest(steps) == FIT
    assert max(work(steps)) <= STEP
    encoded = [place for step in steps for _, place, *_ in step]
    assert encoded == list(range(count))


@pytest.mark.parametrize(
    "settings", [None, {"encoder_limit": "kept"}], ids=["inactive", "switched off"]
)
def test_it_is_vllms_own_count_where_it_is_not_wanted(scheduler, settings):
    assert largest(run(scheduler(settings), [many(300)])) == 300


def test_unpruned_images_are_scheduled_as_without_the_plugin(scheduler):
    def requests():
        return [
            make_request(f"r{i}", [(f"{i} {j}", N, N) for j in range(i % 4)], text=20 * i + 1)
            for i in range(20)
        ]

    assert run(scheduler(), requests()) == run(scheduler(None), requests())


def test_an_image_larger_than_a_step_goes_alone(scheduler):
    large = [(seed, 100, 3 * STEP) for seed in range(3)]
    steps = run(scheduler(), [make_request("large", large), many(5, name="small")])
    assert [len(step) for step in steps if any(name == "large" for name, *_ in step)] == [1, 1, 1]


def test_one_request_of_many_images_leaves_half_a_step_to_the_others(scheduler):
    others = [make_request(f"other{i}", [(f"other{i}", 1, N)]) for i in range(4)]
    arrivals = {each.request_id: 3 for each in others}
    steps = run(scheduler(), [many(300), *others], arrivals=arrivals)
    first = {name: place for place, step in reversed(list(enumerate(steps))) for name, *_ in step}
    assert all(
        first[each.request_id] <= 4 for each in others
    )  # not behind the 300 images, which take 22 steps
    assert max(work(steps)) <= STEP


def test_prompts_that_must_stay_whole_are_never_split(scheduler):
    """Without chunked prefill, as vLLM sets it for poolers that need a prompt in one piece."""
    one = scheduler(enable_chunked_prefill=False, max_num_batched_tokens=4096)
    requests = [make_request(f"r{i}", [(i, 64, 576)], answer=1) for i in range(20)]
    requests.append(make_request("many", [(f"many {i}", 1, N) for i in range(60)], answer=1))
    lengths = {each.request_id: each.num_prompt_tokens for each in requests}
    scheduled, stock = [], one.schedule

    def watched():
        output = stock()
        scheduled.extend(output.num_scheduled_tokens.items())
        return output

    one.schedule = watched
    steps = run(one, requests)
    assert sorted(scheduled) == sorted(lengths.items())  # each once, and whole
    most = one.max_num_encoder_input_tokens
    assert max(work(steps)) > most  # the one prompt that is larger than a step, on its own
    within = [step for step, total in zip(steps, work(steps), strict=True) if total <= most]
    assert {name for step in steps if step not in within for name, *_ in step} == {"many"}


def test_an_image_that_is_cached_or_repeated_costs_nothing(scheduler):
    one = scheduler()
    again = make_request("again", [(f"many {seed}", 1, N) for seed in range(FIT)])
    steps = run(
        one, [many(FIT), again, make_request("twice", [("same", 1, N)] * 50)], arrivals={"again": 2}
    )
    assert sum(map(len, steps)) == FIT + 1


def test_an_image_that_is_loaded_from_elsewhere_costs_nothing(scheduler):
    """Stock allows it and charges nothing for it, which shows when it asks for the next one."""
    request = many(2 * FIT)
    gate = EncoderGate(scheduler(), request, STEP)
    manager = SimpleNamespace(can_allocate=lambda *args: True)
    with gate.over(manager):
        assert all(
            manager.can_allocate(request, place, STEP, 0) for place in range(FIT)
        )  # nothing was charged
        charged = [
            manager.can_allocate(request, FIT + place, STEP - place, 0) for place in range(FIT)
        ]
        assert all(charged)
        assert not manager.can_allocate(request, 0, STEP - FIT, 0)


@pytest.mark.parametrize("seed", range(6))
def test_any_mix_stays_within_the_limit_and_is_answered(scheduler, seed):
    """Both policies, asynchronous or not, few KV blocks (preemption), duplicates, pruned and
    unpruned images, text.
    """
    chance = random.Random(seed)
    one = scheduler(
        scheduling_policy=["fcfs", "priority"][seed % 2],
        async_scheduling=seed % 3 == 0,
        enable_prefix_caching=seed % 2 == 0,
        max_num_batched_tokens=[512, 2048][seed // 3],
        blocks=[260, 10_000][seed % 2],
    )
    requests = []
    for number in range(40):
        images = []
        for _ in range(chance.choice([0, 1, 1, 2, 9])):
            total = chance.choice([N, 40])
            images.append(
                (chance.randrange(60), min(chance.choice([1, 5, 30, total]), total), total)
            )
        requests.append(
            make_request(
                f"r{number}", images, text=chance.randrange(1, 60), priority=chance.randrange(3)
            )
        )
    arrivals = {each.request_id: chance.randrange(30) for each in requests}
    steps = run(one, requests, arrivals=arrivals, delay=int(seed % 3 == 0))
    assert max(work(steps)) <= one.max_num_encoder_input_tokens
    manager = one.encoder_cache_manager
    assert not one.requests
    assert not manager.request_cached_ids
    assert manager.num_freeable_slots == manager.cache_size
    assert "can_allocate" not in vars(manager)
