"""Choosing plugins by option and environment, and what becomes of the options."""

import argparse
import os
from types import SimpleNamespace

import pytest

from fsr_vllm import activation, cli_args
from fsr_vllm.compat import plugins, state
from fsr_vllm.compat.plugins import AUTO_GROUPS, ENDPOINT_GROUP, enable_plugins


def test_groups_that_load_by_themselves():
    import vllm.plugins as theirs

    groups = {value for name, value in vars(theirs).items() if name.endswith("_GROUP")}
    assert groups == {*AUTO_GROUPS, ENDPOINT_GROUP}


@pytest.fixture
def groups(monkeypatch):
    found = {
        "vllm.general_plugins": ["fsr", "lora", "other"],
        "vllm.platform_plugins": ["board"],
        "vllm.endpoint_plugins": ["fsr", "other"],
    }
    monkeypatch.setattr(
        plugins,
        "entry_points",
        lambda group: [SimpleNamespace(name=name) for name in found.get(group, [])],
    )


@pytest.mark.usefixtures("groups")
def test_naming_a_plugin_keeps_all_that_loaded_by_itself(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")  # so that it is put back, whatever is written to it
    del os.environ["VLLM_PLUGINS"]
    enable_plugins(["fsr"])
    named = os.environ["VLLM_PLUGINS"].split(",")
    assert set(named) == {"lora", "board", "fsr"}  # not "other": that would open its endpoint
    enable_plugins(["fsr"])
    assert os.environ["VLLM_PLUGINS"].split(",") == named


@pytest.mark.usefixtures("groups")
def test_a_set_variable_is_only_added_to(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora")
    enable_plugins(["fsr", "other"])
    assert os.environ["VLLM_PLUGINS"] == "lora,fsr,other"


def test_the_state_is_inherited_and_copied_by_ray(monkeypatch):
    from vllm.ray.ray_env import get_env_vars_to_copy

    monkeypatch.setenv(state.VARIABLE, "")
    monkeypatch.setenv(state.RAY, "THEIRS")
    for _ in range(2):
        state.put_state(state.ACTIVE)
    assert state.state() == os.environ[state.VARIABLE] == state.ACTIVE
    assert os.environ[state.RAY] == f"THEIRS,{state.VARIABLE}"
    assert {"THEIRS", state.VARIABLE} <= get_env_vars_to_copy()
    state.put_state(state.INACTIVE)
    assert state.VARIABLE not in os.environ
    assert state.state() == state.INACTIVE


def parse(*argv):
    parser = argparse.ArgumentParser()
    cli_args.add_cli_args(parser)
    return parser.parse_args(argv)


@pytest.mark.usefixtures("groups")
def test_plugin_option_takes_lists_and_repeats(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    args = parse("--plugin", "fsr,lora", "--plugin", "other", "--fsr-budget", "64")
    assert args.plugin == ["fsr", "lora", "other"]
    assert args.fsr_budget == 64


@pytest.mark.usefixtures("groups")
def test_another_package_may_have_brought_the_option():
    parser = argparse.ArgumentParser()
    parser.add_argument("--plugin")
    cli_args.add_cli_args(parser)
    assert parser.parse_args(["--plugin", "anything"]).plugin == "anything"


@pytest.mark.usefixtures("groups")
def test_options_become_additional_config_beside_the_users_own(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "fsr")
    args = parse("--fsr-max-budget", "128", "--fsr-detail-budgets", '{"low": 16}')
    args.additional_config = {"theirs": 1, "fsr": {"method": "random", "max_budget": 5}}
    cli_args.merge_cli_args(args)
    cli_args.merge_cli_args(args)  # child processes do it again
    fsr = {"method": "random", "max_budget": 128, "detail_budgets": {"low": 16}}
    assert args.additional_config == {"theirs": 1, "fsr": fsr}


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("value", [(), ("288:64",), ("m",)])
def test_adaptive_without_bounds_is_an_error_of_the_command_line(monkeypatch, capsys, value):
    monkeypatch.setenv("VLLM_PLUGINS", "fsr")
    with pytest.raises(SystemExit):
        parse("--fsr-adaptive", *value)
    said = capsys.readouterr().err
    assert "--fsr-adaptive" in said
    assert "LOW:HIGH" in said
    assert parse("--fsr-adaptive", "64:288").fsr_adaptive == "64:288"


def test_adaptive_is_refused_where_there_is_no_load_to_follow(tmp_path):
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    settings = {"fsr": {"adaptive": "64:288"}}
    with pytest.raises(ValueError, match="needs a server"):
        activation.put_settings(EngineArgs(str(tmp_path), additional_config=settings))
    with pytest.raises(ValueError, match="--disable-log-stats"):
        activation.put_settings(
            AsyncEngineArgs(str(tmp_path), additional_config=settings, disable_log_stats=True)
        )


@pytest.mark.parametrize("value", ["64", 64, ["budget"]])
def test_settings_that_are_no_object_are_refused(value):
    with pytest.raises(ValueError, match="must be an object"):
        activation.put_settings(SimpleNamespace(additional_config={"fsr": value}))
