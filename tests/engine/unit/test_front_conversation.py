"""What a conversation adds to a request: one parse, one question and one detail per image."""

from dataclasses import replace

import pytest

from fsr_vllm.compat.attributes import IGNORED_KEY
from fsr_vllm.compat.errors import as_request_errors
from fsr_vllm.engine import conversation
from fsr_vllm.engine.conversation import budgets_by_detail, settled
from fsr_vllm.engine.inputs import judged, refuse_extra_args, requested
from fsr_vllm.params import (
    MAX_QUESTION,
    REQUEST_KEY,
    Derived,
    FieldError,
    FsrRequest,
    RequestFields,
    ServerSettings,
)
from tests.engine.unit.front import apply, model_config, picture, processor

IMAGE = {"type": "image_url", "image_url": {"url": "u"}}
LOW = {"type": "image_url", "image_url": {"url": "u", "detail": "low"}}


def user(*parts):
    return {"role": "user", "content": list(parts)}


ONE = [user(IMAGE, "What?")]
TEXT = [user("Hello.")]


def settle(settings, *conversations, given=None, **more):
    config = model_config(settings, **more)
    return settled(config, list(conversations), given)


def derived(settings, messages, given=None):
    (found,) = settle(settings, messages, given=given)
    return found[REQUEST_KEY].derived


def test_fields_and_what_is_derived_travel_as_one_value():
    (found,) = settle({}, ONE, given={"theirs": 1, "fsr_budget": 64, "fsr_method": None})
    request = FsrRequest(RequestFields(fsr_budget=64), Derived(("What?",)))
    assert found == {"theirs": 1, REQUEST_KEY: request}


@pytest.mark.parametrize("given", [None, {}, {"theirs": 1}])
def test_who_asks_for_nothing_is_left_alone(given):
    for settings in (None, {}, {"unsupported": "no tower"}, {"budget": "off"}):
        (found,) = settle(settings, ONE, given=given)
        assert found is given
    (found,) = settle({"budget": 64}, TEXT, given=given)
    assert found is given


@pytest.mark.parametrize(
    "settings", [{"budget": 64}, {"max_budget": 64}, {"detail_budgets": {"low": 16}}]
)
def test_a_default_needs_the_question_too(settings):
    (found,) = settle(settings, ONE)
    assert found == {REQUEST_KEY: FsrRequest(RequestFields(), Derived(("What?",)))}


def test_text_alone_is_judged_and_has_nothing_to_prune():
    assert settle({}, TEXT, given={"theirs": 1, "fsr_budget": 64}) == [{"theirs": 1}]
    with pytest.raises(FieldError, match="fsr_budget must be"):
        settle({}, TEXT, given={"fsr_budget": 0})


def test_conversations_of_one_call_have_one_parse_and_questions_of_their_own(monkeypatch):
    seen, stock = [], RequestFields.parse
    monkeypatch.setattr(RequestFields, "parse", lambda *given: seen.append(given) or stock(*given))
    found = settle({}, ONE, [user(IMAGE, "Who?")], TEXT, given={"fsr_budget": 64})
    assert len(seen) == 1
    assert [one[REQUEST_KEY].derived.questions for one in found[:2]] == [("What?",), ("Who?",)]
    assert found[0][REQUEST_KEY].fields is found[1][REQUEST_KEY].fields and found[2] == {}


def test_one_parse_from_the_conversation_to_the_placeholders(monkeypatch):
    seen, stock = [], RequestFields.parse
    monkeypatch.setattr(RequestFields, "parse", lambda *given: seen.append(given) or stock(*given))
    ours = processor({})
    config = ours.info.ctx.model_config
    (given,) = settled(config, [ONE], {"fsr_budget": 6})
    given = judged(config, given, True)
    result = apply(ours, [picture(70, 30)], **given)
    assert len(seen) == 1 and result["fsr"].kept == 6
    # Offline prompts have no conversation: the processor is the first that meets their fields.
    prompt = judged(config, {"fsr_budget": 5}, True)
    assert len(seen) == 1 and apply(ours, [picture(70, 30)], **prompt)["fsr"].kept == 5
    assert len(seen) == 2


def test_what_a_server_parsed_is_neither_parsed_nor_searched_again(monkeypatch):
    monkeypatch.setattr(RequestFields, "parse", None)
    request = FsrRequest(RequestFields(fsr_budget=64))
    messages = [user({**IMAGE, "fsr_budget": 3}, "What?")]  # a server would have refused it
    (found,) = settle({}, messages, given={REQUEST_KEY: request, "theirs": 1})
    expected = replace(request, derived=Derived(("What?",)))
    assert found == {"theirs": 1, REQUEST_KEY: expected}
    assert settle({}, TEXT, given={REQUEST_KEY: request, "theirs": 1}) == [{"theirs": 1}]


@pytest.mark.parametrize("value", [{"questions": ["q"]}, ["q"], "q", 1])
def test_a_client_cannot_make_what_a_server_parsed(value):
    with pytest.raises(FieldError, match="unknown field 'fsr_request'"):
        settle({"budget": 64}, ONE, given={REQUEST_KEY: value})


@pytest.mark.parametrize("given", [None, {"fsr_budget": 3}])
def test_offline_a_field_in_a_wrong_place_is_found_here(given):
    messages = [user("Hi."), user({**IMAGE, "fsr_budget": 3}, "What?")]
    for settings, words in ((None, "not active"), ({"unsupported": "no tower"}, "no tower")):
        with pytest.raises(FieldError, match=words):
            settle(settings, TEXT, messages, given=given)
    with pytest.raises(FieldError, match="is not read: fsr_budget belongs") as error:
        settle({}, TEXT, messages, given=given)
    assert error.value.field == "messages[1].content[0].fsr_budget"
    with pytest.raises(FieldError, match="the field is called fsr_budget"):
        settle({}, ONE, given={"fsrBudget": 3})


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("field", ["fsr_budget", "fsr_question"])
def test_a_list_has_one_entry_per_image(field, count):
    value = {"fsr_budget": 1, "fsr_question": "q"}[field]
    messages = [user(IMAGE, IMAGE, "What?")]
    with pytest.raises(FieldError, match=f"{count} entries for 2 image") as error:
        settle({}, messages, given={field: [value] * count})
    assert error.value.field == field
    (found,) = settle({}, messages, given={field: [value] * 2})
    assert getattr(found[REQUEST_KEY].fields, field) == [value] * 2


def test_beyond_the_limit_of_images_nothing_is_derived():
    messages = [user(IMAGE, IMAGE, IMAGE, "What?")]
    (found,) = settle({}, messages, given={"fsr_budget": 3}, limit=2)
    assert found == {"fsr_budget": 3}  # vLLM's own error comes next
    (found,) = settle({}, messages, given={"fsr_budget": 3}, limit=3)
    assert len(found[REQUEST_KEY].derived.questions) == 3
    with pytest.raises(FieldError, match="fsr_budget has 4 entries; a prompt may hold 3 images"):
        settle({}, TEXT, given={"fsr_budget": [1] * 4}, limit=3)


def test_of_a_long_question_the_end_is_read():
    text = "start " + "x" * MAX_QUESTION + " end?"
    (question,) = derived({}, [user(IMAGE, text)], {"fsr_budget": 3}).questions
    assert question == text[-MAX_QUESTION:] and question.endswith("x end?")


def test_half_a_surrogate_pair_becomes_a_character_of_any_tokenizer():
    questions = derived({}, [user(IMAGE, IMAGE, "a\ud800?")], {"fsr_budget": 3}).questions
    assert questions == ("a??", "a??")


@pytest.mark.parametrize("question", ["Why?", ""])
def test_a_question_that_was_given_is_the_only_one(question):
    found = derived({"budget": 3}, ONE, {"fsr_question": question})
    assert found == Derived()


def test_details_have_budgets_where_the_client_names_none():
    messages = [user(LOW, IMAGE, "What?")]
    settings = {"budget": 5, "detail_budgets": {"low": 2, "high": "off"}}
    assert derived(settings, messages).budgets == (2, None)
    assert derived(settings, ONE).budgets == ()
    assert derived(settings, messages, {"fsr_budget": 4}).budgets == ()
    auto = ServerSettings.parse({"detail_budgets": {"auto": 0.5}})
    assert budgets_by_detail(auto, messages) == (None, 0.5)
    assert budgets_by_detail(ServerSettings(), messages) == ()


def test_content_that_can_be_read_once_is_still_there():
    messages = [{"role": "user", "content": iter([IMAGE, "What?"])}]
    assert derived({"budget": 3}, messages).questions == ("What?",)
    assert messages == ONE


def test_a_plugin_left_aside_reads_nothing():
    given = {"fsrBudget": "many"}
    (found,) = settle(None, [user({**IMAGE, "fsr_budget": 3})], given=given, **{IGNORED_KEY: True})
    assert found is given
    config = model_config(None, **{IGNORED_KEY: True})
    assert judged(config, {"fsr_budget": "many", "theirs": 1}, True) == {"theirs": 1}


def test_prompts_are_judged_where_no_processor_will():
    config = model_config({"max_budget": 8})
    given = {"fsr_budget": 9, "theirs": 1}
    assert judged(config, given, True) is given  # by the processor, with the images in hand
    with pytest.raises(ValueError, match="above this server's maximum 8") as error:
        judged(config, given, False)
    assert error.value.parameter == "fsr_budget"
    assert judged(config, {"fsr_budget": 8, "theirs": 1}, False) == {"theirs": 1}
    assert judged(config, {"fsr_budget": None, "theirs": 1}, True) == {"theirs": 1}
    settled_already = {REQUEST_KEY: FsrRequest(RequestFields(fsr_budget=9))}
    assert judged(config, settled_already, True) is settled_already
    assert judged(config, settled_already, False) == {}


def test_what_is_asked_for():
    config = model_config({})
    for nothing in (None, {}, {"theirs": 1}, {"fsr_budget": None}):
        assert requested(config, nothing) is None
        assert requested(model_config(), nothing) is None
    assert requested(config, {"fsr_budget": 3.0}).fields.fsr_budget == 3
    for settings, words in ((None, "not active"), ({"unsupported": "no tower"}, "no tower")):
        for name in ("fsr_budget", "fsrBudget"):
            with pytest.raises(FieldError, match=f"{name}: .*{words}") as error:
                requested(model_config(settings), {"theirs": 1, name: 3})
            assert error.value.field == name


def test_errors_of_fields_are_errors_of_the_request():
    with pytest.raises(ValueError, match="why") as error, as_request_errors(FieldError):
        raise FieldError("fsr_budget", "why")
    assert error.value.parameter == "fsr_budget" and error.value.__cause__ is None


def test_what_vllms_rendering_is_given(monkeypatch):
    hooks = []
    monkeypatch.setattr(conversation, "wrap_chat_rendering", hooks.append)
    conversation.install()
    (settle_one,) = hooks
    (found,) = settle_one(model_config({}), [ONE], {"fsr_budget": 3})
    assert found[REQUEST_KEY].derived.questions == ("What?",)
    with pytest.raises(ValueError, match="fsr_budget must be") as error:
        settle_one(model_config({}), [ONE], {"fsr_budget": 0})
    assert error.value.parameter == "fsr_budget"


def test_nobody_reads_fields_of_sampling_parameters():
    refuse_extra_args(model_config({}), {"theirs": 1, "fsr_budget": None})
    for config in (model_config({}), model_config()):
        with pytest.raises(ValueError, match="fsrBudget is not read .* mm_processor_kwargs"):
            refuse_extra_args(config, {"theirs": 1, "fsr_method": "x", "fsrBudget": 3})
    refuse_extra_args(model_config(None, **{IGNORED_KEY: True}), {"fsr_budget": 3})
