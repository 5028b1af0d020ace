"""Options of one server: what each may be, how `off` reads, and where settings are found again."""

from types import SimpleNamespace

import pytest

from fsr_vllm.params import (
    SETTINGS_KEY,
    FieldError,
    ServerSettings,
    given_settings,
    ignoring,
    read_settings,
    refusal,
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"budget": False}, {"budget": "off"}),
        ({"budget": 32.0}, {"budget": 32}),
        ({"max_budget": 64.0}, {"max_budget": 64}),
        ({"max_budget": False}, {"max_budget": None}),
        ({"adaptive": False}, {"adaptive": None}),
        ({"text_encoder": False}, {"text_encoder": "none"}),
        ({"pixel_cache_bytes": False}, {"pixel_cache_bytes": 0}),
        ({"detail_budgets": False}, {"detail_budgets": {}}),
        (
            {"detail_budgets": {"low": 8.0, "high": False, "original": "off"}},
            {"detail_budgets": {"low": 8, "high": "off", "original": "off"}},
        ),
    ],
    ids=str,
)
def test_off_as_yaml_reads_it(values, expected):
    settings = ServerSettings.parse(values)
    assert {name: getattr(settings, name) for name in expected} == expected


def test_details_are_those_of_openai():
    from typing import get_args, get_type_hints

    from openai.types.chat.chat_completion_content_part_image_param import ImageURL
    from openai.types.responses.response_input_image_param import ResponseInputImageParam

    from fsr_vllm.params.server import DETAILS

    for kind in (ImageURL, ResponseInputImageParam):
        assert (
            set(DETAILS)
            >= set(literals(get_type_hints(kind)["detail"], get_args))
            >= {"low", "high", "auto"}
        )


def literals(hint, get_args):
    inner = get_args(hint)
    return [value for one in inner for value in literals(one, get_args)] if inner else [hint]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"bugdet": 1}, "fsr.bugdet"),
        ({"budget": 1.0}, "fsr.budget"),
        ({"budget": "off", "max_budget": 64}, "fsr.budget"),
        ({"budget": 8, "min_budget": 16}, "fsr.budget"),
        ({"max_budget": 0}, "fsr.max_budget"),
        ({"max_budget": True}, "fsr.max_budget"),
        ({"max_budget": "64"}, "fsr.max_budget"),
        ({"min_budget": 65, "max_budget": 64}, "fsr.min_budget"),
        ({"method": "nope"}, "fsr.method"),
        ({"method": 3}, "fsr.method"),
        ({"relevance_sign": 2}, "fsr.relevance_sign"),
        ({"detail_budgets": {"medium": 3}}, "fsr.detail_budgets"),
        ({"detail_budgets": {"low": 1.0}}, "fsr.detail_budgets"),
        ({"detail_budgets": [1]}, "fsr.detail_budgets"),
        ({"detail_budgets": []}, "fsr.detail_budgets"),
        ({"detail_budgets": 0}, "fsr.detail_budgets"),
        ({"detail_budgets": ""}, "fsr.detail_budgets"),
        ({"text_encoder": None}, "fsr.text_encoder"),
        ({"text_encoder": ""}, "fsr.text_encoder"),
        ({"text_encoder": " "}, "fsr.text_encoder"),
        ({"text_encoder": "name@"}, "fsr.text_encoder"),
        ({"tokens_per_image": 3}, "fsr.tokens_per_image"),
        ({"method": False}, "fsr.method"),
        ({"budget": True}, "fsr.budget"),
        ({"ignore": "yes"}, "fsr.ignore"),
        ({"max_budget": 64, "budget": 65}, "fsr.budget"),
        ({"max_budget": 64, "detail_budgets": {"low": "off"}}, "fsr.detail_budgets"),
    ],
    ids=str,
)
def test_no_settings(settings, field):
    with pytest.raises(FieldError) as error:
        ServerSettings.parse(settings)
    assert error.value.field == field


def test_settings_survive_the_model_config():
    given = {"budget": 0.5, "max_budget": 300, "relevance_sign": "-1", "detail_budgets": {"low": 4}}
    settings = ServerSettings.parse(given)
    assert ServerSettings.model_validate_json(settings.model_dump_json()) == settings
    assert settings.relevance_sign == -1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_budget": 0}, "fsr.max_budget must be an integer from 1 to 1,000,000; got 0"),
        ({"min_budget": True}, "fsr.min_budget must be an integer from 1 to 1,000,000; got True"),
        ({"pixel_cache_bytes": -1}, "must be a number of bytes from 0 (off) to 1,099,511,627,776"),
        ({"feature_cache_bytes": 1.5}, "must be a number of bytes from 0 (off)"),
        ({"method": 3}, "fsr.method must be the name of a method; got 3"),
        ({"method": "fastv"}, "no server can give fastv its inputs"),
        ({"relevance_sign": True}, "fsr.relevance_sign must be auto, 1 or -1; got True"),
        ({"relevance_sign": 1.0}, "fsr.relevance_sign must be auto, 1 or -1; got 1.0"),
        ({"encoder_limit": None}, "fsr.encoder_limit must be unpruned or kept; got None"),
        ({"model_alias": 1}, "fsr.model_alias must be true or false; got 1"),
        ({"detail_budgets": {"medium": 3}}, "must map low, high, auto or original to a budget"),
        ({"detail_budgets": {"low": None}}, "must map low, high, auto or original to a budget"),
        ({"detail_budgets": {"low": "x"}}, "fsr.detail_budgets must be an integer from 1 to"),
        ({"text_encoder": "@rev"}, "must be auto, a path, a name or NAME@REVISION, llm, or none"),
        ({"text_encoder": "a@ "}, "must be auto, a path, a name or NAME@REVISION, llm, or none"),
        ({"adaptive": 64}, "fsr.adaptive needs its bounds"),
        ({"tokens_per_image": 576}, "unknown fsr option 'tokens_per_image'; known: budget, "),
        ({"unsupported": "x"}, "unknown fsr option 'unsupported'"),
        ({"signals": ("x",)}, "unknown fsr option 'signals'"),
    ],
    ids=str,
)
def test_what_a_wrong_option_is_told(settings, words):
    with pytest.raises(FieldError) as error:
        ServerSettings.parse(settings)
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["llm", "a/b", "a/b@main", " a/b@1.0 ", "odd@place@rev", "/a/@x"])
def test_names_of_text_encoders(name):
    assert ServerSettings.parse({"text_encoder": name}).text_encoder == name.strip()


def test_signs_may_be_text():
    read = {sign: ServerSettings.parse({"relevance_sign": sign}) for sign in ("1", "+1", "-1", -1)}
    assert [settings.relevance_sign for settings in read.values()] == [1, 1, -1, -1]


def test_settings_are_found_again_with_what_start_up_knows():
    settings = ServerSettings.parse({"budget": 64}).model_copy(
        update={"tokens_per_image": 576, "unsupported": "no tower", "signals": ("saliency",)}
    )
    config = SimpleNamespace(**{SETTINGS_KEY: settings.model_dump_json()})
    assert read_settings(config) == settings
    assert refusal(config) == "no tower"
    assert read_settings(SimpleNamespace()) is None
    assert refusal(SimpleNamespace()).startswith("plugin fsr is not active; start the server with")
    supported = settings.model_copy(update={"unsupported": None})
    assert refusal(SimpleNamespace(**{SETTINGS_KEY: supported.model_dump_json()})) is None


def test_settings_as_given():
    assert given_settings(None, named=False) is None
    assert given_settings({"other": 1}, named=False) is None
    assert given_settings(None, named=True) == {}
    assert given_settings({"fsr": None}, named=False) == {}
    assert given_settings({"fsr": {"budget": 1}}, named=True) == {"budget": 1}
    for wrong in (False, 3, "on", [1]):
        with pytest.raises(FieldError, match="must be an object of options") as error:
            given_settings({"fsr": wrong}, named=True)
        assert ('{"ignore": true}' in str(error.value)) == (wrong is False)
    assert not ignoring(None)
    assert not ignoring({"ignore": False})
    assert ignoring({"ignore": True, "budget": "nonsense"})
    with pytest.raises(FieldError, match="fsr.ignore must be true or false"):
        ignoring({"ignore": 1})


def test_the_engine_refuses_what_the_command_line_would(tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    from fsr_vllm import activation

    def start(**arguments):
        activation.put_settings(EngineArgs(str(tmp_path), **arguments))

    with pytest.raises(FieldError, match="fsr.min_budget 65 must not exceed"):
        start(additional_config={"fsr": {"min_budget": 65, "max_budget": 64}})
    with pytest.raises(ValueError, match="fsr.pixel_cache_bytes is .* more than"):
        start(additional_config={"fsr": {"pixel_cache_bytes": 1 << 40}})
    for active in ({}, {"additional_config": {"fsr": {}}}):
        with pytest.raises(ValueError, match="additional_config=.*budget"):
            start(mm_processor_kwargs={"fsr_budget": 32}, **active)
