"""The request hook alone, on plain objects: what it and the conversation add to a request, or
leave.
"""

import tracemalloc
from types import SimpleNamespace

import pytest

from fsr_vllm import adaptive
from fsr_vllm.compat.attributes import RESULT_KEY
from fsr_vllm.engine.conversation import DERIVED_KEY, Derived, completed, settled
from fsr_vllm.params import (
    MAX_QUESTION,
    MAX_QUESTIONS,
    SETTINGS_KEY,
    Report,
    RequestFields,
    ServerSettings,
)
from fsr_vllm.server import alias
from fsr_vllm.server.requests import RequestHook, RequestReport, current_report


def unsupported(model_config):
    return model_config.unsupported


HOOK = RequestHook(unsupported)
LIMIT = 999  # images in a prompt
MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": "u"}},
            {"type": "text", "text": "What?"},
        ],
    }
]


def configured(settings=None, unsupported=None):
    config = SimpleNamespace()
    if settings is not None:
        setattr(config, SETTINGS_KEY, ServerSettings(**settings).model_dump_json())
    limits = SimpleNamespace(get_limit_per_prompt=lambda modality: LIMIT)
    return SimpleNamespace(hf_config=config, unsupported=unsupported, multimodal_config=limits)


def after(
    settings=None,
    messages=MESSAGES,
    mm_processor_kwargs=None,
    unsupported_because=None,
    xargs=None,
    **extra,
):
    """What the processor is given for a request, after the hook and after its conversation was
    read.
    """
    model_config = configured(settings, unsupported_because)
    request = SimpleNamespace(
        model_extra=extra, mm_processor_kwargs=mm_processor_kwargs, vllm_xargs=xargs
    )
    HOOK.before(SimpleNamespace(model_config=model_config), request)
    (once,) = settled(model_config, [messages], request.mm_processor_kwargs, unsupported)
    HOOK.before(
        SimpleNamespace(model_config=model_config), request
    )  # a next turn renders the same request again
    assert settled(model_config, [messages], request.mm_processor_kwargs, unsupported) == [once]
    return once


def filled(settings, values, images):
    """The fields that these images are planned with, and the default among them where it follows
    the load.
    """
    settings, values = ServerSettings.parse(settings), dict(values)
    derived = values.pop(DERIVED_KEY)
    return completed(settings, RequestFields.parse(values, settings), derived, [576] * images)


def planned(settings, *args, images=1, **kwargs):
    fields, by_load = filled(settings, after(settings, *args, **kwargs), images)
    return fields.fsr_budget, by_load


@pytest.mark.parametrize("given", [None, {}, {"theirs": 1}])
def test_a_request_without_fields_is_left_alone(given):
    assert after(mm_processor_kwargs=given) is given  # inactive
    assert after({}, mm_processor_kwargs=given) is given
    assert after({}, mm_processor_kwargs=given, unsupported_because="no tower") is given
    assert (
        after(
            {"budget": 64}, messages=[{"role": "user", "content": "hi"}], mm_processor_kwargs=given
        )
        is given
    )


def test_fields_and_the_derived_question_join_the_others_keys():
    assert after({}, mm_processor_kwargs={"theirs": 1}, fsr_budget=64) == {
        "theirs": 1,
        "fsr_budget": 64,
        DERIVED_KEY: Derived(("What?",)),
    }
    for given in ("Why?", ""):
        said = after({}, fsr_budget=64, fsr_question=given)
        assert said["fsr_question"] == given and said[DERIVED_KEY] == Derived()
        assert filled({}, said, 1)[0].fsr_question == given
    assert filled({}, after({}, fsr_budget=64), 1)[0].fsr_question == ["What?"]


def test_a_default_budget_needs_the_question_too():
    assert after({"budget": 64}) == after({"max_budget": 64}) == {DERIVED_KEY: Derived(("What?",))}


def test_detail_comes_after_the_request_and_before_the_default():
    settings = {"budget": 100, "detail_budgets": {"low": 16}}
    low = [{"type": "image_url", "image_url": {"url": "u", "detail": "low"}}]
    messages = [{"role": "user", "content": [*low, *MESSAGES[0]["content"]]}]
    assert planned(settings, messages, images=2) == ([16, 100], None)
    assert planned(settings, messages, images=2, fsr_budget=8) == (8, None)


def test_derived_values_are_kept_to_the_servers_range_and_never_judged():
    settings = {"min_budget": 100, "max_budget": 200, "budget": 0.1, "detail_budgets": {"low": 0.9}}
    low = [{"type": "image_url", "image_url": {"url": "u", "detail": "low"}}]
    messages = [{"role": "user", "content": [*low, *MESSAGES[0]["content"]]}]
    assert planned(settings, messages, images=2) == ([200, 100], None)
    # Where vLLM sees another number of images than the conversation has, nothing of it holds, and
    # nobody is blamed.
    fields, _ = filled(settings, after(settings, messages), 3)
    assert fields.fsr_budget == [100] * 3 and fields.fsr_question is None


def test_what_a_client_sends_as_derived_is_an_unknown_field():
    for value in ({"questions": ["q"]}, ["q"], "q"):
        with pytest.raises(ValueError, match="unknown field"):
            after({"budget": 64}, mm_processor_kwargs={DERIVED_KEY: value})
        with pytest.raises(ValueError, match="unknown field"):
            settled(configured({"budget": 64}), [MESSAGES], {DERIVED_KEY: value}, unsupported)


def test_beyond_the_models_limit_nothing_is_derived():
    image = MESSAGES[0]["content"][0]
    for count in (LIMIT, LIMIT + 1):
        messages = [
            {"role": "user", "content": [*[image] * count, {"type": "text", "text": "What?"}]}
        ]
        found = after({"budget": 64}, messages)
        if count > LIMIT:
            assert found is None  # vLLM's own error comes next
            assert after({}, messages, fsr_budget=[64, 65]) == {"fsr_budget": [64, 65]}
        else:
            questions = found[DERIVED_KEY].questions
            assert len(questions) == LIMIT and len({id(question) for question in questions}) == 1


@pytest.mark.parametrize("field", ["fsr_budget", "fsr_question"])
def test_lists_longer_than_any_prompt_are_refused_before_they_are_read(field):
    class Unread(list):
        def __iter__(self):
            raise AssertionError("read")

    text = [{"role": "user", "content": "no image"}]
    with pytest.raises(ValueError, match=f"{field} has {LIMIT + 1} entries") as error:
        after({}, text, **{field: Unread([1] * (LIMIT + 1))})
    assert error.value.parameter == field
    with pytest.raises(ValueError, match=f"{field} has {LIMIT + 1} entries"):
        settled(configured({}), [text], {field: Unread([1] * (LIMIT + 1))}, unsupported)


def test_the_questions_of_a_list_have_a_longest_length_together():
    many = MAX_QUESTIONS // MAX_QUESTION
    image = MESSAGES[0]["content"][0]
    messages = [{"role": "user", "content": [image] * many}]
    assert after({}, messages, fsr_budget=1, fsr_question=["x" * MAX_QUESTION] * many)
    messages = [{"role": "user", "content": [image] * (many + 1)}]
    tracemalloc.start()
    with pytest.raises(ValueError, match="in all") as error:
        after({}, messages, fsr_budget=1, fsr_question=["x" * MAX_QUESTION] * many + ["x"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(str(error.value)) < 200 and peak < MAX_QUESTIONS  # nothing was joined


def test_one_validation_serves_all_conversations_of_a_call(monkeypatch):
    seen, stock = [], RequestFields.parse
    monkeypatch.setattr(RequestFields, "parse", lambda *given: seen.append(given) or stock(*given))
    found = settled(configured({}), [MESSAGES] * 50, {"fsr_budget": 64}, unsupported)
    assert len(seen) == 1 and [one["fsr_budget"] for one in found] == [64] * 50


def test_a_default_that_follows_the_load_stands_in_for_details_without_a_budget(monkeypatch):
    monitor = adaptive.LoadMonitor(64, 288, clock=lambda: now[0])
    monkeypatch.setattr(adaptive, "_active", monitor)
    now = [0.0]
    settings = {"adaptive": "64:288", "detail_budgets": {"low": 16, "high": 500}}
    low = [{"type": "image_url", "image_url": {"url": "u", "detail": "low"}}]
    messages = [{"role": "user", "content": [*low, *MESSAGES[0]["content"]]}]
    assert after({"adaptive": "64:288"}) == {
        DERIVED_KEY: Derived(("What?",))
    }  # the processor's, at the last moment
    report = RequestReport()
    token = current_report.set(report)
    try:
        assert planned(settings, messages, images=2) == ([16, 288], 288)
        arrived = after(settings, messages)
        monitor.read(0, adaptive.Load(0, 100))
        now[0] += 5.0
        assert filled(settings, arrived, 2)[0].fsr_budget == [16, 64]  # not as on arrival
        assert planned({"adaptive": "64:288"}) == ([64], 64)
        assert planned(settings, [{"role": "user", "content": low}]) == ([16], None)
        assert planned(settings, messages, images=2, fsr_budget=500) == (500, None)
        assert report.adaptive is None
        HOOK.after([{RESULT_KEY: Report(64, 576, 64)}])
        assert report.adaptive == 64
    finally:
        current_report.reset(token)


def test_contents_that_can_be_read_once_are_still_there_for_vllm():
    messages = [{"role": "user", "content": iter(MESSAGES[0]["content"])}]
    after({}, messages, fsr_budget=64)
    assert messages == MESSAGES


def test_header_and_body():
    token = current_report.set(RequestReport(budget_header="64"))
    try:
        assert after({})["fsr_budget"] == 64
        assert after({}, fsr_budget=64)["fsr_budget"] == 64
        for other in (65, 0.64, "off", [64]):
            with pytest.raises(ValueError, match="differs"):
                after({}, fsr_budget=other)
        with pytest.raises(ValueError, match="not active"):
            after(None)
    finally:
        current_report.reset(token)


def test_the_report_adds_up_all_inputs_of_a_request():
    report = RequestReport()
    token = current_report.set(report)
    try:
        HOOK.after(
            [
                {RESULT_KEY: Report(64, 576)},
                {"prompt_token_ids": []},
                {RESULT_KEY: Report(1, 576)},
            ]
        )
    finally:
        current_report.reset(token)
    assert (report.kept, report.total) == (65, 1152)
    HOOK.after([{RESULT_KEY: Report(64, 576)}])  # outside an HTTP request: nobody to tell


def test_xargs_and_dropped_bodies_are_read_too():
    assert after({}, xargs={"fsr_budget": 64, "theirs": 1})["fsr_budget"] == 64
    assert after({}, xargs={"fsr_options": '{"rho": 0.5}'})["fsr_options"] == {"rho": 0.5}
    for text in ("{", "[1]"):
        with pytest.raises(ValueError, match="fsr_options"):
            after({}, xargs={"fsr_options": text})
    with pytest.raises(ValueError, match="two places"):
        after({}, xargs={"fsr_budget": 64}, fsr_budget=65)
    token = current_report.set(RequestReport())
    try:
        HOOK.note(
            configured({}),
            {
                "model": "m",
                "fsr_budget": 8,
                "fsr_method": None,
                "vllm_xargs": {"fsr_question": "q"},
            },
        )
        given = after({})
        assert (
            given["fsr_budget"] == 8 and given["fsr_question"] == "q" and "fsr_method" not in given
        )
    finally:
        current_report.reset(token)


@pytest.fixture
def named():
    """A function that puts a model name through the alias and returns what is left of it."""

    def run(name, settings=None, reason=None):
        model_config = configured({"model_alias": True} if settings is None else settings, reason)
        request = SimpleNamespace(model=name)
        suffix = alias.split(model_config, request)
        alias.accept(model_config, suffix, unsupported)
        return request.model

    yield run
    alias.accept(None, None, unsupported)


@pytest.mark.parametrize(("suffix", "budget"), [("128", 128), ("0.25", 0.25), ("off", "off")])
def test_a_name_with_a_budget(named, suffix, budget):
    assert named(f"a/b@fsr{suffix}") == "a/b"
    assert after({})["fsr_budget"] == budget
    assert after({}, fsr_budget=7)["fsr_budget"] == 7  # the request itself comes first
    low = [{"type": "image_url", "image_url": {"url": "u", "detail": "low"}}]
    assert (
        after({"detail_budgets": {"low": 16}}, [{"role": "user", "content": low}])["fsr_budget"]
        == budget
    )
    named("a/b")  # the next request of the same task
    assert after({}) is None


def test_names_that_are_none_of_ours(named):
    for name in ("a/b", "a@b", "@fsr64", None, ""):
        assert named(name) == name
    assert named("a/b@fsr64", {}) == "a/b@fsr64"  # not enabled: vLLM's own 404
    assert alias.budget() is None


@pytest.mark.parametrize(
    "suffix", ["0", "-1", "1.0", "many", "", "true", "[1,2]", "1000001", "[" * 5000]
)
def test_wrong_budgets_behind_a_name(named, suffix):
    with pytest.raises(ValueError, match="model") as error:
        named(f"a/b@fsr{suffix}")
    assert error.value.field == "model" and alias.budget() is None


def test_a_name_with_a_budget_keeps_to_the_servers_range_and_abilities(named):
    with pytest.raises(ValueError, match="64"):
        named("m@fsr65", {"model_alias": True, "max_budget": 64})
    with pytest.raises(ValueError, match="0.9 of 576 = 518, above") as error:
        named("m@fsr0.9", {"model_alias": True, "max_budget": 64, "tokens_per_image": 576})
    assert error.value.field == "model"
    with pytest.raises(ValueError, match="no tower"):
        named("m@fsr64", reason="no tower")


class GenerateRequest(SimpleNamespace):
    """By the name of vLLM's request class that carries rendered images."""


def test_endpoints_that_cannot_prune_say_so(named):
    request = GenerateRequest(model="m", model_extra={"fsr_budget": 64})
    with pytest.raises(ValueError, match="on this endpoint") as error:
        HOOK.accept(configured({}), request, None)
    assert error.value.parameter == "fsr_budget"
    with pytest.raises(ValueError, match="on this endpoint") as error:
        HOOK.accept(
            configured({"model_alias": True}), GenerateRequest(model="m", model_extra={}), "64"
        )
    assert error.value.parameter == "model"
    HOOK.accept(configured({}), GenerateRequest(model="m", model_extra={}), None)
