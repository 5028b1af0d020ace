"""`--fsr-*` on vLLM's own command line: values, combinations and slips are told apart before
anything starts.
"""

import argparse
import json

import pytest

import fsr_vllm
from fsr_vllm import cli_args
from fsr_vllm.params import ServerSettings


@pytest.fixture(scope="module")
def vllm_parser():
    """The parser of `vllm serve`, to which the plugin added its options."""
    from vllm.entrypoints.cli import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from fsr_vllm import plugin

    plugin.register()
    parser = FlexibleArgumentParser(prog="vllm")
    (command,) = serve.cmd_init()
    command.subparser_init(parser.add_subparsers())
    return parser


@pytest.fixture
def parse(vllm_parser, monkeypatch):
    """Options, as a user types them, to the additional_config that vLLM gets."""
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")

    def parsed(*options):
        args = vllm_parser.parse_args(["serve", "M", *options])
        cli_args.merge_cli_args(args)
        return args.additional_config

    return parsed


@pytest.fixture
def refused(parse, capsys):
    """What argparse says to options that it refuses: the last line it prints."""

    def said(*options):
        with pytest.raises(SystemExit) as error:
            parse(*options)
        assert error.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1].partition("error: ")[2]

    return said


VALUES = [
    (
        "budget", "half",
        "must be an integer from 1 to 1,000,000 (visual tokens kept per image), a number above 0",
    ),
    ("budget", "1.0", "one token or the whole image"),
    ("budget", "null", "got 'null'"),
    ("budget", "[64]", "got [64]"),
    ("budget", "true", "got True"),
    ("adaptive", "288:64", "LOW:HIGH must satisfy"),
    ("min_budget", "some", "must be an integer from 1 to 1,000,000; got 'some'"),
    ("max_budget", "0", "must be an integer from 1 to 1,000,000; got 0"),
    ("method", "divprun", "did you mean divprune?"),
    ("method", "zzz", "must be one of fsr, "),
    ("method", "quota", "no server can give quota its inputs"),
    ("text_encoder", "", "must be auto, a path, a name or NAME@REVISION, llm, or none; got ''"),
    ("relevance_sign", "2", "must be auto, 1 or -1; got '2'"),
    ("detail_budgets", "low", "must map low, high, auto or original to a budget"),
    ("detail_budgets", '{"medium": 3}', "must map low, high, auto or original to a budget"),
    ("detail_budgets", '{"low": 1.5}', "must be an integer"),
    ("feature_cache_bytes", "-1", "must be a number of bytes from 0 (off)"),
    ("encoder_limit", "both", "must be unpruned or kept; got 'both'"),
    ("pixel_cache_bytes", "many", "must be a number of bytes from 0 (off)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "words"), VALUES, ids=str)
def test_a_wrong_value_is_an_error_of_its_option(refused, name, text, words):
    message = refused("--plugin", "fsr", f"{cli_args.option(name)}={text}")
    assert message.startswith(f"argument {cli_args.option(name)}: ")
    assert words in message
    assert "fsr." not in message
    assert "Expecting value" not in message


def test_every_option_that_takes_a_value_has_a_wrong_one_above():
    flags = {
        name
        for name in ServerSettings.options()
        if isinstance(ServerSettings.model_fields[name].default, bool)
    }
    assert {name for name, _, _ in VALUES} == set(ServerSettings.options()) - flags


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--fsr-min-budget", "65", "--fsr-max-budget", "64"),
            "--fsr-min-budget 65 must not exceed --fsr-max-budget 64",
        ),
        (
            ("--fsr-budget", "200", "--fsr-max-budget", "100"),
            "--fsr-budget 200, above --fsr-max-budget 100",
        ),
        (
            ("--fsr-budget", "8", "--fsr-min-budget", "16"),
            "--fsr-budget 8, below --fsr-min-budget 16",
        ),
        (
            ("--fsr-budget", "off", "--fsr-max-budget", "100"),
            '--fsr-budget "off" = all visual tokens of an image, above --fsr-max-budget 100',
        ),
        (
            ("--fsr-detail-budgets", '{"low": 200}', "--fsr-max-budget", "100"),
            "--fsr-detail-budgets 200, above --fsr-max-budget 100",
        ),
        (
            ("--fsr-adaptive", "64:288", "--fsr-max-budget", "100"),
            "--fsr-adaptive 288, above --fsr-max-budget 100",
        ),
        (
            ("--fsr-adaptive", "64:288", "--fsr-budget", "128"),
            "--fsr-adaptive sets the default budget; leave --fsr-budget out",
        ),
        (
            ("--fsr-budget", "200", "--additional-config", '{"fsr": {"max_budget": 100}}'),
            "--fsr-budget 200, above fsr.max_budget 100",
        ),
        (("--fsr-bugdet", "3"), "unrecognized arguments: --fsr-bugdet; did you mean --fsr-budget?"),
        (
            ("--fsr_max_bugdet=3",),
            "unrecognized arguments: --fsr-max-bugdet; did you mean --fsr-max-budget?",
        ),
        (("--no-fsr-method",), "argument --fsr-method: must be the name of a method; got False"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_do_not_go_together(refused, options, message):
    assert refused("--plugin", "fsr", *options) == message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"fsr": {"bugdet": 3}}, "unknown fsr option 'bugdet'; known: budget, "),
        ({"fsr": {"method": "nope"}}, "fsr.method must be one of fsr, "),
        ({"fsr": False}, 'give {"ignore": true}'),
        ({"fsr": {"ignore": "yes"}}, "fsr.ignore must be true or false"),
    ],
    ids=str,
)
def test_additional_config_is_judged_there_too(refused, config, words):
    assert words in refused("--additional-config", json.dumps(config))


def test_fields_in_the_options_of_the_processor_are_told_their_option(refused):
    message = refused("--plugin", "fsr", "--mm-processor-kwargs", '{"fsr_budget": 32}')
    assert message.startswith("argument --mm-processor-kwargs: fsr_budget")
    assert "--fsr-budget" in message
    assert "--fsr-method" in refused(
        "--mm-processor-kwargs", '{"images_kwargs": {"fsr-method": "random"}}'
    )
    assert "the request says it" in refused("--mm-processor-kwargs", '{"fsr_question": "What?"}')


def test_caches_beyond_the_memory_of_the_machine(refused, monkeypatch):
    assert refused("--plugin", "fsr", "--fsr-pixel-cache-bytes", str(1 << 40)).startswith(
        "--fsr-pixel-cache-bytes is "
    )
    assert refused("--plugin", "fsr", "--fsr-feature-cache-bytes", "1e12").startswith(
        "--fsr-feature-cache-bytes is "
    )
    monkeypatch.setattr("fsr_vllm.cli_args.checks.device_memory", lambda: 1000)
    message = refused("--plugin", "fsr", "--fsr-feature-cache-bytes", "1001")
    assert message == (
        "--fsr-feature-cache-bytes is 1,001 bytes, more than the 1,000 bytes of memory that the "
        "device has"
    )
    assert cli_args.oversized(ServerSettings.parse({"feature_cache_bytes": 1000})) is None


def test_values_arrive_as_settings_have_them(parse):
    given = parse(
        "--plugin",
        "fsr",
        "--fsr-budget",
        "64.0",
        "--fsr-relevance-sign",
        "-1",
        "--fsr-detail-budgets.low",
        "off",
    )
    assert given == {"fsr": {"budget": 64, "relevance_sign": -1, "detail_budgets": {"low": "off"}}}
    assert ServerSettings.parse(given["fsr"]).budget == 64


YAML = """
plugin: [fsr]
fsr-budget: off
fsr-detail-budgets: {low: 32.0, high: off, original: off}
fsr-text-encoder: off
fsr-pixel-cache-bytes: off
fsr-model-alias: on
additional-config: {fsr: {budget: off, adaptive: off}}
"""


def test_off_in_a_yaml_file_means_off(parse, tmp_path):
    (tmp_path / "server.yaml").write_text(YAML)
    settings = ServerSettings.parse(parse("--config", str(tmp_path / "server.yaml"))["fsr"])
    assert settings.budget == "off"
    assert settings.text_encoder == "none"
    assert settings.model_alias
    assert settings.detail_budgets == {"low": 32, "high": "off", "original": "off"}
    assert settings.pixel_cache_bytes == 0
    assert settings.adaptive is None
    (tmp_path / "flags.yaml").write_text(
        "plugin: [fsr]\nfsr-budget: off\nfsr-model-alias: off\nfsr-ignore: off\n"
    )
    settings = ServerSettings.parse(parse("--config", str(tmp_path / "flags.yaml"))["fsr"])
    assert settings.budget == "off"
    assert not settings.model_alias
    assert not settings.ignore
    (tmp_path / "slip.yaml").write_text("plugin: [fsr]\nfsr-bugdet: off\n")
    with pytest.raises(SystemExit):
        parse("--config", str(tmp_path / "slip.yaml"))


@pytest.mark.parametrize("name", ["min_budget", "max_budget", "adaptive", "pixel_cache_bytes"])
def test_off_on_the_command_line_undoes_what_additional_config_sets(parse, name):
    value = "32:64" if name == "adaptive" else 64
    given = parse(
        "--plugin",
        "fsr",
        cli_args.option(name),
        "off",
        "--additional-config",
        json.dumps({"fsr": {name: value}}),
    )
    assert getattr(ServerSettings.parse(given["fsr"]), name) == (
        0 if name == "pixel_cache_bytes" else None
    )


def test_no_budget_is_off_although_the_file_says_another(parse):
    assert (
        parse("--plugin", "fsr", "--fsr-budget", "64", "--no-fsr-budget")["fsr"]["budget"] is False
    )
    assert ServerSettings.parse({"budget": False}).budget == "off"


def test_ignoring_accepts_all_other_options_and_uses_none(parse):
    for options in (
        ("--fsr-ignore", "--fsr-budget", "64", "--fsr-method", "zzz", "--fsr-budget", "half"),
        ("--plugin", "fsr", "--fsr-ignore", "--fsr-adaptive", "64:288", "--fsr-budget", "1"),
        ("--additional-config", '{"fsr": {"ignore": true, "bugdet": 3}}', "--fsr-max-budget", "0"),
        ("--plugin", "fsr", "--fsr-ignore", "--mm-processor-kwargs", '{"fsr_budget": 32}'),
    ):
        assert parse(*options)["fsr"]["ignore"] is True


def test_options_need_the_plugin(refused):
    assert refused("--fsr-budget", "64").startswith("--fsr-budget needs the plugin: ")


def test_help_has_no_default_none(vllm_parser, capsys, monkeypatch):
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setattr(FlexibleArgumentParser, "_search_keyword", None)
    with pytest.raises(SystemExit):
        vllm_parser.parse_args(["serve", "--help=plugins"])
    text = " ".join(capsys.readouterr().out.split())
    assert "None" not in text
    assert "--no-fsr" not in text
    for name in ServerSettings.options():
        assert cli_args.option(name) in text
    for default in ("(default: fsr)", "(default: auto)", "(default: 268435456)", "else off)"):
        assert default in text


def test_a_namespace_of_another_parser_is_judged_too(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "fsr")
    with pytest.raises(SystemExit, match="--fsr-min-budget 65 must not exceed"):
        cli_args.merge_cli_args(argparse.Namespace(fsr_min_budget=65, fsr_max_budget=64))


def test_methods_that_cannot_be_served_are_no_choices(refused):
    unserved = {name for name, info in fsr_vllm.list_methods().items() if not info.servable}
    said = refused("--plugin", "fsr", "--fsr-method", "zzz")
    choices = said.partition("one of ")[2].partition(";")[0]
    assert unserved
    assert set(choices.split(", ")) == set(fsr_vllm.list_methods()) - unserved
