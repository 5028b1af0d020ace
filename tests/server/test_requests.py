"""The request hook alone, on plain objects: what it and the conversation add to a request, or
leave.
"""

import tracemalloc
from types import SimpleNamespace

import pytest

from fsr_vllm import adaptive
from fsr_vllm.compat.attributes import RESULT_KEY
from fsr_vllm.engine.conversation import settled
from fsr_vllm.engine.planning import completed
from fsr_vllm.params import (
    MAX_QUESTION,
    NOTHING,
    REQUEST_KEY,
    Derived,
    Report,
    RequestFields,
    ServerSettings,
    request_of,
)
from fsr_vllm.params.request import MAX_QUESTIONS
from fsr_vllm.server import requests

from .hooked import (
    IMAGE,
    LIMIT,
    MESSAGES,
    after,
    configured,
    hooked,
    parsed,
    reported,
)

pytestmark = pytest.mark.usefixtures("own_report")


LOW = {"type": "image_url", "image_url": {"url": "u", "detail": "low"}}


def filled(settings, request, images):
    """The fields that these images are planned with, and the default among them where it follows
    the load.
    """
    settings = ServerSettings.parse(settings)
    return completed(settings, request.fields, request.derived, [576] * images)


def planned(settings, images=1, **said):
    fields, by_load = filled(settings, request_of(after(settings, **said)), images)
    return fields.fsr_budget, by_load


def test_a_request_is_load_once_it_is_rendered_whoever_checked_its_model():
    monitor = adaptive.LoadMonitor(8, 64)
    with reported(monitor=monitor) as report:
        for _ in range(2):
            requests.before(SimpleNamespace(model_config=configured({})), parsed())
        assert monitor.load().waiting == 1
        report.close()
    assert monitor.load().waiting == 0


@pytest.mark.parametrize("given", [None, {}, {"theirs": 1}])
def test_a_request_without_fields_is_left_alone(given):
    text = [{"role": "user", "content": "hi"}]
    assert after(mm_processor_kwargs=given) is given  # inactive
    assert after({}, "no tower", mm_processor_kwargs=given) is given
    for settings, messages in (({}, MESSAGES), ({"budget": 64}, text)):
        left = dict(after(settings, mm_processor_kwargs=given, messages=messages))
        # Where it stays, the processor takes it off: it says that nobody has to look again.
        assert left.pop(REQUEST_KEY, NOTHING) == NOTHING
        assert left == (given or {})


def test_text_prompts_are_not_touched():
    prompt = SimpleNamespace(model_extra={}, mm_processor_kwargs=None, prompt="Say")
    requests.before(SimpleNamespace(model_config=configured({"budget": 64})), prompt)
    assert prompt.mm_processor_kwargs is None


def test_fields_and_the_derived_question_join_the_others_keys():
    found = after({}, mm_processor_kwargs={"theirs": 1, "fsr_method": "random"}, fsr_budget=64)
    request = found.pop(REQUEST_KEY)
    assert found == {"theirs": 1}
    assert request.derived == Derived(("What?",))
    assert request.fields == RequestFields(fsr_budget=64, fsr_method="random")
    assert filled({}, request, 1)[0].fsr_question == ["What?"]
    for given in ("Why?", ""):
        request = request_of(after({}, fsr_budget=64, fsr_question=given))
        assert request.fields.fsr_question == given
        assert request.derived == Derived()
        assert filled({}, request, 1)[0].fsr_question == given


def test_a_default_budget_needs_the_question_too():
    for settings in ({"budget": 64}, {"max_budget": 64}):
        request = request_of(after(settings))
        assert request.derived == Derived(("What?",))
        assert request.fields == RequestFields()


def test_detail_comes_after_the_request_and_before_the_default():
    settings = {"budget": 100, "detail_budgets": {"low": 16}}
    messages = [{"role": "user", "content": [LOW, *MESSAGES[0]["content"]]}]
    assert planned(settings, messages=messages, images=2) == ([16, 100], None)
    assert planned(settings, messages=messages, images=2, fsr_budget=8) == (8, None)


def test_derived_values_are_kept_to_the_servers_range_and_never_judged():
    settings = {"min_budget": 100, "max_budget": 200, "budget": 0.1, "detail_budgets": {"low": 0.9}}
    messages = [{"role": "user", "content": [LOW, *MESSAGES[0]["content"]]}]
    assert planned(settings, messages=messages, images=2) == ([200, 100], None)
    # Where vLLM sees another number of images than the conversation has, nothing of it holds, and
    # nobody is blamed.
    fields, _ = filled(settings, request_of(after(settings, messages=messages)), 3)
    assert fields.fsr_budget == [100] * 3
    assert fields.fsr_question is None


def test_what_a_client_sends_as_a_parsed_request_is_an_unknown_field():
    for value in ({"fields": {"fsr_budget": 64}}, {"derived": {"questions": ["q"]}}, ["q"], "q"):
        for said in ({"mm_processor_kwargs": {REQUEST_KEY: value}}, {REQUEST_KEY: value}):
            with pytest.raises(ValueError, match="unknown field 'fsr_request'"):
                after({"budget": 64}, **said)
        with pytest.raises(ValueError, match="unknown field 'fsr_request'"):
            settled(configured({"budget": 64}), [MESSAGES], {REQUEST_KEY: value})


def test_beyond_the_models_limit_nothing_is_derived():
    for count in (LIMIT, LIMIT + 1):
        content = [*[IMAGE] * count, {"type": "text", "text": "What?"}]
        messages = [{"role": "user", "content": content}]
        found = request_of(after({"budget": 64}, messages=messages))
        if count > LIMIT:
            assert found.derived == Derived()  # vLLM's own error comes next
            found = request_of(after({}, messages=messages, fsr_budget=[64, 65]))
            assert found.fields.fsr_budget == [64, 65]
        else:
            questions = found.derived.questions
            assert len(questions) == LIMIT
            assert len({id(question) for question in questions}) == 1


@pytest.mark.parametrize("field", ["fsr_budget", "fsr_question"])
def test_lists_longer_than_any_prompt_are_refused_before_they_are_read(field):
    class Unread(list):
        def __iter__(self):
            raise AssertionError("read")

    text = [{"role": "user", "content": "no image"}]
    with pytest.raises(ValueError, match=f"{field} has {LIMIT + 1} entries") as error:
        after({}, messages=text, **{field: Unread([1] * (LIMIT + 1))})
    assert error.value.parameter == field
    with pytest.raises(ValueError, match=f"{field} has {LIMIT + 1} entries"):
        settled(configured({}), [text], {field: Unread([1] * (LIMIT + 1))})


def test_the_questions_of_a_list_have_a_longest_length_together():
    many = MAX_QUESTIONS // MAX_QUESTION
    messages = [{"role": "user", "content": [IMAGE] * many}]
    assert after({}, messages=messages, fsr_budget=1, fsr_question=["x" * MAX_QUESTION] * many)
    messages = [{"role": "user", "content": [IMAGE] * (many + 1)}]
    too_many = ["x" * MAX_QUESTION] * many + ["x"]
    tracemalloc.start()
    with pytest.raises(ValueError, match="in all") as error:
        after({}, messages=messages, fsr_budget=1, fsr_question=too_many)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(str(error.value)) < 200
    assert peak < MAX_QUESTIONS  # nothing was joined


@pytest.fixture
def parses(monkeypatch):
    """All that RequestFields.parse was given."""
    seen, stock = [], RequestFields.parse
    monkeypatch.setattr(RequestFields, "parse", lambda *given: seen.append(given) or stock(*given))
    return seen


def test_one_validation_serves_all_conversations_of_a_call(parses):
    found = settled(configured({}), [MESSAGES] * 50, {"fsr_budget": 64})
    assert len(parses) == 1
    assert [request_of(one).fields.fsr_budget for one in found] == [64] * 50


@pytest.mark.parametrize("said", [{"fsr_budget": 64}, {"header": "64"}, {"model": "m@fsr64"}])
def test_one_validation_serves_a_request_and_all_that_is_rendered_for_it(parses, said):
    model_config = configured({"model_alias": True})
    header = said.get("header")
    body = {key: value for key, value in said.items() if key != "header"}
    with reported(header=header):
        hooked(model_config, parsed(**body))
        for _ in range(3):  # a batch renders requests of its own making, one per conversation
            request = parsed(**{**body, "model": "m"})
            requests.before(SimpleNamespace(model_config=model_config), request)
            assert request_of(request.mm_processor_kwargs).fields.fsr_budget == 64
            settled(model_config, [MESSAGES], request.mm_processor_kwargs)
    assert len(parses) == 1


def test_a_default_that_follows_the_load_stands_in_for_details_without_a_budget(monkeypatch):
    monitor = adaptive.LoadMonitor(64, 288, clock=lambda: now[0])
    monkeypatch.setattr(adaptive, "_active", monitor)
    now = [0.0]
    settings = {"adaptive": "64:288", "detail_budgets": {"low": 16, "high": 500}}
    messages = [{"role": "user", "content": [LOW, *MESSAGES[0]["content"]]}]
    # The processor's, at the last moment.
    assert request_of(after({"adaptive": "64:288"})).derived == Derived(("What?",))
    assert planned(settings, messages=messages, images=2) == ([16, 288], 288)
    arrived = request_of(after(settings, messages=messages))
    monitor.read(0, adaptive.Load(0, 100))
    now[0] += 5.0
    assert filled(settings, arrived, 2)[0].fsr_budget == [16, 64]  # not as on arrival
    assert planned({"adaptive": "64:288"}) == ([64], 64)
    assert planned(settings, messages=[{"role": "user", "content": [LOW]}]) == ([16], None)
    assert planned(settings, messages=messages, images=2, fsr_budget=500) == (500, None)
    with reported() as report:
        requests.after([{RESULT_KEY: Report(64, 576)}])
        assert report.adaptive is None
        requests.after([{RESULT_KEY: Report(64, 576, 64)}, {RESULT_KEY: Report(8, 8)}])
        assert report.adaptive == 64


def test_contents_that_can_be_read_once_are_still_there_for_vllm():
    messages = [{"role": "user", "content": iter(MESSAGES[0]["content"])}]
    after({}, messages=messages, fsr_budget=64)
    assert messages == MESSAGES


def test_the_report_adds_up_all_inputs_of_a_request():
    inputs = [{RESULT_KEY: Report(64, 576)}, {"prompt_token_ids": []}, {RESULT_KEY: Report(1, 576)}]
    with reported() as report:
        requests.after(inputs)
    assert (report.kept, report.total) == (65, 1152)
    requests.after(inputs)  # outside an HTTP request: nobody to tell
    assert (report.kept, report.total) == (65, 1152)
