"""The options of `vllm serve`: `--plugin`, and one `--fsr-*` for each of ServerSettings, judged
before anything starts.

Values are judged when all are parsed, not one by one: with --fsr-ignore none of them is.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from fsr_vllm.cli_args.checks import (
    Unfit,
    conflict,
    given_options,
    is_ignoring,
    misplaced_fields,
    misspelt,
    option,
    oversized,
)
from fsr_vllm.compat.config_files import wrap_config_files
from fsr_vllm.compat.engine_args import judge_parsed
from fsr_vllm.compat.plugins import PLUGIN, enable_plugins, installed_plugins, named_plugins
from fsr_vllm.compat.types import Anything, Namespace, Parser

__all__ = [
    "add_cli_args", "conflict", "merge_cli_args", "misplaced_fields", "no_options", "option",
    "oversized",
]  # fmt: skip

logger = logging.getLogger("vllm.fsr_vllm")

_METAVARS = {
    "budget": "BUDGET", "adaptive": "LOW:HIGH", "min_budget": "TOKENS", "max_budget": "TOKENS",
    "method": "NAME", "text_encoder": "ENCODER", "relevance_sign": "SIGN",
    "detail_budgets": "JSON", "feature_cache_bytes": "BYTES", "pixel_cache_bytes": "BYTES",
    "encoder_limit": "COUNT",
}  # fmt: skip
# Taken as they are; other values are JSON, or a word.
_TEXTS = ("adaptive", "method", "text_encoder", "relevance_sign", "encoder_limit")
# argparse's formatter of vLLM appends the default, None for all of ours, to a help text that does
# not mention it.
_NO_DEFAULT = "%(default).0s"


class PluginAction(argparse.Action):
    """`--plugin NAME[,NAME]`: names installed plugins before any child process starts."""

    def __call__(
        self,
        parser: Parser,
        namespace: Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Read one occurrence of the option."""
        names = [name.strip() for name in str(values).split(",") if name.strip()]
        installed = installed_plugins()
        for name in names:
            if name not in installed:
                known = ", ".join(installed)
                raise argparse.ArgumentError(
                    self, f"no vLLM plugin named {name!r} is installed (installed: {known})"
                )
        enable_plugins(names)
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest, None) or []), *names])


def _reader(name: str) -> Callable[[str], Anything]:
    """What turns the text behind an option into the setting's value, or into an Unfit."""

    def read(text: str) -> Anything:
        from fsr_vllm.params import FieldError, ServerSettings

        value: Any = text
        if name not in _TEXTS:
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                value = text.strip().lower() if text.strip().lower() == "off" else text
        if value is None:
            value = text
        try:
            found: Any = getattr(ServerSettings.parse({name: value}), name)
        except FieldError as error:
            found = Unfit(text, str(error).removeprefix(f"fsr.{name} "))
        if text.strip().lower() == "off" and (found is None or isinstance(found, Unfit)):
            off = _off(name)  # None would count as not given
            return found if isinstance(off, Unfit) else off
        return found

    read.__name__ = name
    return read


def add_cli_args(parser: Parser) -> None:
    """Add `--plugin` and the `--fsr-*` options; another package may have brought `--plugin`."""
    from fsr_vllm.params import ServerSettings

    group = parser.add_argument_group("Plugins", "Options of installed vLLM plugins (fsr-vllm).")
    try:
        group.add_argument(
            "--plugin",
            action=PluginAction,
            metavar="NAME[,NAME]",
            help="Activate installed vLLM plugins, in addition to VLLM_PLUGINS. "
            f"Repeatable.{_NO_DEFAULT}",
        )
    except argparse.ArgumentError:
        logger.debug("--plugin is already defined")
    for name in ServerSettings.options():
        field = ServerSettings.model_fields[name]
        text = str(field.description).replace("%", "%%")
        dest = f"fsr_{name}"
        no_option, hidden = _no(option(name)), argparse.SUPPRESS  # how a YAML file says `off`
        if isinstance(field.default, bool):
            group.add_argument(
                option(name), action="store_true", default=None, help=f"{text}{_NO_DEFAULT}"
            )
            group.add_argument(
                no_option, action="store_false", dest=dest, default=None, help=hidden
            )
            continue
        if field.default not in (None, {}):
            text = f"{text.removesuffix('.')} (default: {field.default})."
        # The value of --fsr-adaptive is optional to argparse alone: without it, the message is
        # ours.
        more: dict[str, Any] = (
            {"nargs": "?", "const": _reader(name)("")} if name == "adaptive" else {}
        )
        group.add_argument(
            option(name),
            type=_reader(name),
            metavar=_METAVARS[name],
            help=f"{text}{_NO_DEFAULT}",
            **more,
        )
        group.add_argument(
            no_option, action="store_const", const=_off(name), dest=dest, default=None, help=hidden
        )
    wrap_config_files(no_options)
    judge_parsed(parser, lambda namespace, rest: misspelt(rest) or conflict(namespace))


def _no(written: str) -> str:
    return "--no-" + written.removeprefix("--")


def no_options(content: Mapping[str, Any]) -> list[str]:
    """What `off` behind options of ours in a YAML file is on the command line."""
    keys = [str(key).replace("_", "-") for key, value in content.items() if value is False]
    return [_no(f"--{key}") for key in keys if key.startswith("fsr-")]


def _off(name: str) -> bool | Unfit:
    """What `off` means to ServerSettings: False, or an Unfit where there is no such thing."""
    from fsr_vllm.params import FieldError, ServerSettings

    try:
        ServerSettings.parse({name: False})
    except FieldError as error:
        return Unfit("off", str(error).removeprefix(f"fsr.{name} "))
    return False


def merge_cli_args(args: Namespace) -> None:
    """Move `--fsr-*` values into additional_config, which child processes get."""
    reason = conflict(args)  # again: a namespace need not come from our parser
    if reason:
        raise SystemExit(f"vllm: error: {reason}")
    additional = dict(getattr(args, "additional_config", None) or {})
    if is_ignoring(args):
        args.additional_config = {
            **additional,
            "fsr": {**(additional.get("fsr") or {}), "ignore": True},
        }
        return
    given = given_options(args)
    if "fsr" in additional:
        # Of a server: additional_config alone must also open the HTTP face.
        enable_plugins([PLUGIN])
    elif PLUGIN not in named_plugins():
        return  # all that was given is `off`
    if given:
        args.additional_config = {**additional, "fsr": {**(additional.get("fsr") or {}), **given}}
