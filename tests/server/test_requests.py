"""The renderer hook alone, on plain objects: what it adds to a request, and when it leaves one alone."""

from types import SimpleNamespace

import pytest

from fsr_vllm import adaptive
from fsr_vllm.engine.conversation import image_details, image_questions
from fsr_vllm.params import SETTINGS_KEY, ServerSettings
from fsr_vllm.server.requests import RendererHook, RequestReport, current_report

HOOK = RendererHook(image_questions, image_details, ("LlavaForConditionalGeneration",))
MESSAGES = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}, {"type": "text", "text": "What?"}]}
]


def renderer(settings=None, unsupported=None):
    config = SimpleNamespace()
    if settings is not None:
        setattr(config, SETTINGS_KEY, ServerSettings.parse(settings).model_dump_json())
    model_config = SimpleNamespace(hf_config=config, architectures=["LlavaForConditionalGeneration"])
    processor = SimpleNamespace(fsr_unsupported=unsupported)
    return SimpleNamespace(model_config=model_config, renderer=SimpleNamespace(mm_processor=processor))


def after(settings=None, messages=MESSAGES, mm_processor_kwargs=None, unsupported=None, **extra):
    request = SimpleNamespace(model_extra=extra, mm_processor_kwargs=mm_processor_kwargs)
    HOOK.before(renderer(settings, unsupported), request, messages)
    return request.mm_processor_kwargs


@pytest.mark.parametrize("given", [None, {}, {"theirs": 1}])
def test_a_request_without_fields_is_left_alone(given):
    assert after(mm_processor_kwargs=given) is given  # inactive
    assert after({}, mm_processor_kwargs=given) is given
    assert after({}, mm_processor_kwargs=given, unsupported="no tower") is given
    assert after({"budget": 64}, messages=[{"role": "user", "content": "hi"}], mm_processor_kwargs=given) is given


def test_fields_and_the_derived_question_join_the_others_keys():
    assert after({}, mm_processor_kwargs={"theirs": 1}, fsr_budget=64) == {
        "theirs": 1,
        "fsr_budget": 64,
        "fsr_question": ["What?"],
    }
    assert after({}, fsr_budget=64, fsr_question="Why?")["fsr_question"] == "Why?"
    assert after({}, fsr_budget=64, fsr_question="")["fsr_question"] == ""


def test_a_default_budget_needs_the_question_too():
    assert after({"budget": 64}) == {"fsr_question": ["What?"]}
    assert after({"max_budget": 64}) == {"fsr_question": ["What?"]}


def test_detail_comes_after_the_request_and_before_the_default():
    settings = {"budget": 100, "detail_budgets": {"low": 16}}
    low = [{"type": "image_url", "image_url": {"url": "u", "detail": "low"}}]
    messages = [{"role": "user", "content": [*low, *MESSAGES[0]["content"]]}]
    assert after(settings, messages)["fsr_budget"] == [16, 100]
    assert after(settings, messages, fsr_budget=8)["fsr_budget"] == 8


def test_a_default_that_follows_the_load_stands_in_for_details_without_a_budget(monkeypatch):
    monitor = adaptive.LoadMonitor(64, 288, clock=lambda: now[0])
    monkeypatch.setattr(adaptive, "_active", monitor)
    now = [0.0]
    settings = {"adaptive": "64:288", "detail_budgets": {"low": 16, "high": 500}}
    low = [{"type": "image_url", "image_url": {"url": "u", "detail": "low"}}]
    messages = [{"role": "user", "content": [*low, *MESSAGES[0]["content"]]}]
    assert after({"adaptive": "64:288"}) == {"fsr_question": ["What?"]}  # the processor's, at the last moment
    report = RequestReport()
    token = current_report.set(report)
    try:
        assert after(settings, messages)["fsr_budget"] == [16, 288] and report.adaptive == 288
        monitor.read(0, adaptive.Load(0, 100))
        now[0] += 5.0
        assert after(settings, messages)["fsr_budget"] == [16, 64] and report.adaptive == 64
        report.adaptive = None
        assert after(settings, [{"role": "user", "content": low}])["fsr_budget"] == [16]
        assert after(settings, messages, fsr_budget=500)["fsr_budget"] == 500
        assert report.adaptive is None
        HOOK.after([{"fsr_visual_tokens": (64, 576), "fsr_adaptive": 64}])
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
        HOOK.after([{"fsr_visual_tokens": (64, 576)}, {"prompt_token_ids": []}, {"fsr_visual_tokens": (1, 576)}])
    finally:
        current_report.reset(token)
    assert (report.kept, report.total) == (65, 1152)
    HOOK.after([{"fsr_visual_tokens": (64, 576)}])  # outside an HTTP request: nobody to tell
