"""Which requests the HTTP hooks read, search, refuse and count, on plain objects."""

from types import SimpleNamespace

import pytest

from fsr_vllm.engine.conversation import settled
from fsr_vllm.params import NOTHING, REQUEST_KEY, RequestFields, own_fields, request_of
from fsr_vllm.server import ignored, inactive, requests
from fsr_vllm.server.report import current_report

from .hooked import (
    IMAGE,
    MESSAGES,
    GenerateRequest,
    after,
    asked,
    configured,
    hooked,
    parsed,
    reported,
)

pytestmark = pytest.mark.usefixtures("own_report")


def test_bodies_whose_models_drop_our_fields_are_read_too():
    body = {"model": "m", "fsr_budget": 8, "fsr_method": None, "vllm_xargs": {"fsr_question": "q"}}
    with reported():
        requests.note(configured({}), body)
        found = hooked(configured({}), parsed())
    assert request_of(found).fields == RequestFields(fsr_budget=8, fsr_question="q")
    with reported(), pytest.raises(ValueError, match="not active") as error:
        requests.note(configured(), body)
    assert error.value.parameter == "fsr_budget"
    requests.note(configured(), ["no", "object"])


def test_a_pooling_body_adds_what_its_model_dropped():
    model_config = configured({"model_alias": True})
    dropping = parsed(model="m@fsr64")
    with reported():
        hooked(model_config, dropping)
        body = {"messages": MESSAGES, "fsr_budget": 7, "fsr_method": "random"}
        shown = SimpleNamespace(model_extra=body, mm_processor_kwargs=None, vllm_xargs=None)
        requests.before_body(SimpleNamespace(model_config=model_config), shown)
    found = request_of(shown.mm_processor_kwargs).fields
    assert found == RequestFields(fsr_budget=7, fsr_method="random")


class Part(dict):
    """A content part that counts how often it is looked at."""

    seen = 0

    def get(self, *args):
        Part.seen += 1
        return super().get(*args)


@pytest.mark.parametrize("foreign", [False, True])
def test_a_request_is_searched_once(foreign):
    Part.seen = 0
    messages = [{"role": "user", "content": [Part(IMAGE)]}]
    model_config = configured({})
    with reported():
        if foreign:
            requests.note(model_config, {"messages": messages})
        given = hooked(model_config, parsed(messages=messages))
        assert Part.seen == 3  # its type, and the two objects it may hold
    settled(model_config, [MESSAGES], given)
    shown = SimpleNamespace(model_extra={"messages": messages}, mm_processor_kwargs=given)
    with reported(searched=True):
        requests.before_body(SimpleNamespace(model_config=model_config), shown)
    assert Part.seen == 3


def test_misplaced_fields_are_refused_with_their_place_or_with_why_there_are_none():
    wrong = {"metadata": {"fsr_budget": 64}}
    with pytest.raises(ValueError, match=r"metadata\.fsr_budget is not read") as error:
        asked({}, **wrong)
    assert error.value.parameter == "metadata.fsr_budget"
    for settings, unsupported, why in ((None, None, "not active"), ({}, "no tower", "no tower")):
        with pytest.raises(ValueError, match=f"metadata.fsr_budget: .*{why}"):
            after(settings, unsupported, **wrong)
        with pytest.raises(ValueError, match=f"^fsr_budget: .*{why}"):
            after(settings, unsupported, fsr_budget=64)
    with reported(wrong_header=ValueError("x-fsr-x is not read")) as report:
        report.wrong_header.field = "x-fsr-x"
        with pytest.raises(ValueError, match="x-fsr-x is not read"):
            requests.accept(configured({}), parsed(), None)


def test_endpoints_that_cannot_prune_say_so():
    for said, name in (({"fsr_budget": 64}, "fsr_budget"), ({}, "x-fsr-budget")):
        header = None if said else "64"
        with reported(header=header), pytest.raises(ValueError, match="on this endpoint") as error:
            requests.accept(configured({}), parsed(GenerateRequest, **said), None)
        assert error.value.parameter == name
    with pytest.raises(ValueError, match="on this endpoint") as error:
        requests.accept(configured({"model_alias": True}), parsed(GenerateRequest), "64")
    assert error.value.parameter == "model"
    requests.accept(configured({}), parsed(GenerateRequest), None)


def test_only_requests_whose_model_is_known_are_load():
    class Monitor:
        entered = left = 0

        def enter(self):
            self.entered += 1

        def leave(self):
            self.left += 1

    monitor = Monitor()
    with reported(monitor=monitor) as report, pytest.raises(ValueError, match="must be"):
        requests.accept(configured({}), parsed(fsr_budget=0), None)
    report.close()
    assert (monitor.entered, monitor.left) == (0, 0)
    with reported(monitor=monitor) as report:
        requests.accept(configured({}), parsed(fsr_budget=1), None)
        requests.accept(configured({}), parsed(fsr_budget=1), None)
        assert (monitor.entered, monitor.left) == (1, 0)
    report.close()
    assert (monitor.entered, monitor.left) == (1, 1)


def test_requests_without_http_do_not_see_one_another():
    """As of run-batch, where one task may serve many."""
    assert own_fields(hooked(configured({}), parsed(fsr_budget=64))).keys() == {REQUEST_KEY}
    found = request_of(hooked(configured({}), parsed()))
    assert found is NOTHING


def test_bodies_are_searched_before_a_model_drops_what_is_wrong():
    wrong = {"messages": MESSAGES, "extra_body": {"fsr_budget": 64}}
    with reported(), pytest.raises(ValueError, match=r"extra_body\.fsr_budget is not read"):
        requests.note(configured({}), wrong)
    with pytest.raises(ValueError, match=r"extra_body\.fsr_budget is not read"):
        requests.note(configured({}), wrong)  # without HTTP too
    shown = SimpleNamespace(model_extra=wrong, mm_processor_kwargs=None, vllm_xargs=None)
    with reported(), pytest.raises(ValueError, match=r"extra_body\.fsr_budget is not read"):
        requests.before_body(SimpleNamespace(model_config=configured({})), shown)


def test_an_inactive_server_refuses_parsed_requests_and_bodies():
    for said in ({"fsr_budget": 64}, {"fsrBudget": 64}, {"metadata": {"fsr_budget": 64}}):
        for request in (parsed(**said), {"model": "m", "messages": MESSAGES, **said}):
            with pytest.raises(ValueError, match="plugin fsr is not active"):
                inactive.refuse(configured(), request)
    for request in (parsed(), {"model": "m", "messages": MESSAGES}, {"fsr_budget": None}):
        inactive.refuse(configured(), request)


@pytest.mark.parametrize(("room", "hooks"), [
    (requests, {"wrap_renderer", "wrap_pooling", "wrap_foreign_bodies", "wrap_model_check"}),
    (ignored, {"wrap_renderer", "wrap_pooling", "wrap_model_check"}),
    (inactive, {"wrap_refusals"}),
])  # fmt: skip
def test_each_state_hooks_its_surfaces(monkeypatch, room, hooks):
    used = []
    for name in hooks:
        monkeypatch.setattr(room, name, lambda *functions, name=name: used.append(name) or True)
    room.install()
    assert set(used) == hooks


def test_names_with_budgets_need_a_check_to_hook(monkeypatch):
    for name in ("wrap_renderer", "wrap_pooling", "wrap_foreign_bodies"):
        monkeypatch.setattr(requests, name, lambda *functions: None)
    for hooked_it, asked_for in ((True, True), (True, False), (False, False)):
        monkeypatch.setattr(requests, "wrap_model_check", lambda *f, done=hooked_it: done)
        requests.install(model_alias=asked_for)
    with pytest.raises(ValueError, match="checks model names where plugin fsr cannot"):
        requests.install(model_alias=True)


def test_without_http_a_name_still_has_its_budget():
    """The model's check and the renderer meet in one task, as in run-batch."""
    found = hooked(configured({"model_alias": True}), parsed(model="m@fsr64"))
    assert request_of(found).fields == RequestFields(fsr_budget=64)
    assert current_report.get().alias == 64
