"""The options of `vllm serve`: `--plugin`, and one `--fsr-*` for each of ServerSettings, judged
before anything starts.

Values are judged when all are parsed, not one by one: with --fsr-ignore none of them is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsr_vllm.compat.config_files import wrap_config_files
from fsr_vllm.compat.engine_args import python_front_end_bypassed
from fsr_vllm.compat.platform import device_memory
from fsr_vllm.compat.plugins import PLUGIN, enable_plugins, installed_plugins, named_plugins
from fsr_vllm.compat.version import outside_window

logger = logging.getLogger("vllm.fsr_vllm")

_METAVARS = {
    "budget": "BUDGET", "adaptive": "LOW:HIGH", "min_budget": "TOKENS", "max_budget": "TOKENS", "method": "NAME",
    "text_encoder": "ENCODER", "relevance_sign": "SIGN", "detail_budgets": "JSON", "feature_cache_bytes": "BYTES",
    "pixel_cache_bytes": "BYTES", "encoder_limit": "COUNT",
}  # fmt: skip
_TEXTS = (
    "adaptive",
    "method",
    "text_encoder",
    "relevance_sign",
    "encoder_limit",
)  # taken as they are; other values are JSON, or a word
# argparse's formatter of vLLM appends the default, None for all of ours, to a help text that does
# not mention it.
_NO_DEFAULT = "%(default).0s"


class PluginAction(argparse.Action):
    """`--plugin NAME[,NAME]`: names installed plugins before any child process starts."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        names = [name.strip() for name in str(values).split(",") if name.strip()]
        installed = installed_plugins()
        for name in names:
            if name not in installed:
                raise argparse.ArgumentError(
                    self,
                    f"no vLLM plugin named {name!r} is installed (installed: {', '.join(installed)})",
                )
        enable_plugins(names)
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest, None) or []), *names])


@dataclass(frozen=True)
class Unfit:
    """A value that an option cannot have, and why."""

    text: str
    reason: str


def option(name: str) -> str:
    """The command-line option of a setting."""
    return f"--fsr-{name.replace('_', '-')}"


def _reader(name: str) -> Any:
    """What turns the text behind an option into the setting's value, or into an Unfit."""

    def read(text: str) -> Any:
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
            read: Any = getattr(ServerSettings.parse({name: value}), name)
        except FieldError as error:
            read = Unfit(text, str(error).removeprefix(f"fsr.{name} "))
        if text.strip().lower() == "off" and (read is None or isinstance(read, Unfit)):
            off = _off(name)  # None would count as not given
            return read if isinstance(off, Unfit) else off
        return read

    read.__name__ = name
    return read


def add_cli_args(parser: Any) -> None:
    """Add `--plugin` and the `--fsr-*` options; another package may already have brought
    `--plugin`.
    """
    from fsr_vllm.params import ServerSettings

    group = parser.add_argument_group("Plugins", "Options of installed vLLM plugins (fsr-vllm).")
    try:
        group.add_argument(
            "--plugin",
            action=PluginAction,
            metavar="NAME[,NAME]",
            help=f"Activate installed vLLM plugins, in addition to VLLM_PLUGINS. Repeatable.{_NO_DEFAULT}",
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
    parse = parser.parse_known_args

    def parse_and_check(*args: Any, **kwargs: Any) -> Any:
        # Some front ends fail in their own way before they build engine arguments; ours is the
        # clearer message.
        namespace, rest = parse(*args, **kwargs)
        reason = misspelt(rest) or conflict(namespace)
        if reason:
            parser.error(reason)
        return namespace, rest

    parser.parse_known_args = parse_and_check


def _no(written: str) -> str:
    return "--no-" + written.removeprefix("--")


def no_options(content: Mapping[str, Any]) -> list[str]:
    """What `off` behind options of ours in a YAML file is on the command line."""
    keys = [str(key).replace("_", "-") for key, value in content.items() if value is False]
    return [_no(f"--{key}") for key in keys if key.startswith("fsr-")]


def _off(name: str) -> Any:
    """What `off` means as a setting's value: False to ServerSettings, or an Unfit where there is no
    such thing.
    """
    from fsr_vllm.params import FieldError, ServerSettings

    try:
        ServerSettings.parse({name: False})
    except FieldError as error:
        return Unfit("off", str(error).removeprefix(f"fsr.{name} "))
    return False


# --- judging --------------------------------------------------------------------------------------


def misspelt(rest: Iterable[str]) -> str | None:
    """The first unknown option that begins like ours, with the nearest that exists; None if there
    is none.
    """
    from fsr_vllm.params import ServerSettings, cut, did_you_mean

    for word in rest:
        name = str(word).partition("=")[0].replace("_", "-").replace("--no-fsr-", "--fsr-")
        if name.startswith("--fsr-"):
            near = did_you_mean(name, map(option, ServerSettings.options()))
            return (
                f"unrecognized arguments: {cut(name)}{near or '; --help=Plugins lists the options'}"
            )
    return None


def given_options(args: Any) -> dict[str, Any]:
    """The settings that were written as options, by name; `off` is False."""
    from fsr_vllm.params import ServerSettings

    found = {name: getattr(args, f"fsr_{name}", None) for name in ServerSettings.options()}
    return {name: value for name, value in found.items() if value is not None}


def is_ignoring(args: Any) -> bool:
    """Whether these parsed options leave the plugin aside. Errors: FieldError if they are no
    settings at all.
    """
    from fsr_vllm.params import given_settings, ignoring

    in_config = given_settings(getattr(args, "additional_config", None), named=False)
    given = getattr(args, "fsr_ignore", None)
    return ignoring(in_config) if given is None else bool(given)


def conflict(args: Any) -> str | None:
    """What speaks against these parsed options, or None."""
    from fsr_vllm.params import HOW_TO_ACTIVATE, FieldError, ServerSettings, given_settings

    given = given_options(args)
    try:
        if is_ignoring(args):
            return None
        unfit = next(
            ((name, value) for name, value in given.items() if isinstance(value, Unfit)), None
        )
        if unfit is not None:
            return f"argument {option(unfit[0])}: {in_options(unfit[1].reason, given)}"
        settings = given_settings(
            getattr(args, "additional_config", None), PLUGIN in named_plugins()
        )
        reason = misplaced_fields(getattr(args, "mm_processor_kwargs", None))
        if reason:
            return f"argument --mm-processor-kwargs: {reason}"
        outside = outside_window() if settings is not None else None
        if outside:
            return outside
        if settings is None:
            needing = [name for name, value in given.items() if value is not False]
            return f"{option(needing[0])} needs the plugin: {HOW_TO_ACTIVATE}" if needing else None
        return bypass(args) or oversized(ServerSettings.parse({**settings, **given}), given)
    except FieldError as error:
        return in_options(str(error), given)


def bypass(args: Any) -> str | None:
    front_end = python_front_end_bypassed(args)
    if front_end is None:
        return None
    return (
        f"{front_end} answers requests outside the Python front end, where plugin fsr cannot work"
    )


def in_options(message: str, given: Iterable[str]) -> str:
    """A message about settings, with those that were given as options called by their option."""

    def name(match: re.Match[str]) -> str:
        return option(match[1]) if match[1] in given else match[0]

    return re.sub(r"\bfsr\.([a-z_]+)", name, message)


def misplaced_fields(mm_processor_kwargs: Any) -> str | None:
    """Why start-time processor options must not hold fields of ours, by the option that is meant;
    None if none does.
    """
    if not isinstance(mm_processor_kwargs, Mapping):
        return None
    from fsr_vllm.params import ServerSettings, cut
    from fsr_vllm.params.misplaced import is_ours

    for key, value in mm_processor_kwargs.items():
        plain = str(key).lower().replace("-", "_")
        name = plain.removeprefix("fsr").strip("_")
        if is_ours(key) or (plain.startswith("fsr") and name in ServerSettings.options()):
            instead = "the request says it"
            if name in ServerSettings.options():
                instead = f'for all requests it is {option(name)} (additional_config={{"fsr": {{"{name}": ...}}}})'
            return f"{cut(key)} is no option of the Hugging Face processor; {instead}"
        if isinstance(value, Mapping) and (found := misplaced_fields(value)):
            return found
    return None


def oversized(settings: Any, given: Iterable[str] = ()) -> str | None:
    """Which cache is larger than the memory it would lie in; None if they fit."""
    device, host = device_memory(), host_memory()
    for name, memory, where in (
        (
            "feature_cache_bytes",
            device if device is not None else host,
            "the device" if device else "this machine",
        ),
        ("pixel_cache_bytes", host, "this machine"),
    ):
        size = getattr(settings, name)
        if memory is not None and size > memory:
            said = f"fsr.{name} is {size:,} bytes, more than the {memory:,} bytes of memory that {where} has"
            return in_options(said, given)
    return None


def host_memory() -> int | None:
    """Bytes of memory that this machine, or the container around this process, has; None where
    nothing says so.
    """
    found = []
    with contextlib.suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no bound
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)


# --- to additional_config -------------------------------------------------------------------------


def merge_cli_args(args: Any) -> None:
    """Move `--fsr-*` values into additional_config, vLLM's own channel, which child processes get
    with their args.
    """
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
        enable_plugins(
            [PLUGIN]
        )  # of a server: additional_config alone must also open the HTTP face
    elif PLUGIN not in named_plugins():
        return  # all that was given is `off`
    if given:
        args.additional_config = {**additional, "fsr": {**(additional.get("fsr") or {}), **given}}
