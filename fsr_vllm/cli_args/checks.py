"""What speaks against options and settings, before anything starts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fsr_vllm.compat.engine_args import python_front_end_bypassed
from fsr_vllm.compat.platform import device_memory, host_memory
from fsr_vllm.compat.plugins import PLUGIN, named_plugins
from fsr_vllm.compat.types import Namespace
from fsr_vllm.compat.version import outside_window

if TYPE_CHECKING:
    from fsr_vllm.params import ServerSettings


class Unfit(NamedTuple):
    """A value that an option cannot have, and why."""

    text: str
    reason: str


def option(name: str) -> str:
    """The command-line option of a setting."""
    return f"--fsr-{name.replace('_', '-')}"


def misspelt(rest: Iterable[str]) -> str | None:
    """What is wrong with the first unknown option that begins like ours; None if none does."""
    from fsr_vllm.params import ServerSettings, cut, did_you_mean

    for word in rest:
        name = str(word).partition("=")[0].replace("_", "-").replace("--no-fsr-", "--fsr-")
        if name.startswith("--fsr-"):
            near = did_you_mean(name, map(option, ServerSettings.options()))
            return (
                f"unrecognized arguments: {cut(name)}{near or '; --help=Plugins lists the options'}"
            )
    return None


def given_options(args: Namespace) -> dict[str, Any]:
    """The settings that were written as options, by name; `off` is False."""
    from fsr_vllm.params import ServerSettings

    found = {name: getattr(args, f"fsr_{name}", None) for name in ServerSettings.options()}
    return {name: value for name, value in found.items() if value is not None}


def is_ignoring(args: Namespace) -> bool:
    """Whether these options leave the plugin aside; FieldError if they are no settings at all."""
    from fsr_vllm.params import given_settings, ignoring

    in_config = given_settings(getattr(args, "additional_config", None), named=False)
    given = getattr(args, "fsr_ignore", None)
    return ignoring(in_config) if given is None else bool(given)


def conflict(args: Namespace) -> str | None:
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
        front_end = python_front_end_bypassed(args)
        if front_end is not None:
            return (
                f"{front_end} answers requests outside the Python front end, where plugin fsr "
                "cannot work"
            )
        return oversized(ServerSettings.parse({**settings, **given}), given)
    except FieldError as error:
        return in_options(str(error), given)


def in_options(message: str, given: Iterable[str]) -> str:
    """A message about settings, with those that were given as options called by their option."""

    def name(match: re.Match[str]) -> str:
        return option(match[1]) if match[1] in given else match[0]

    return re.sub(r"\bfsr\.([a-z_]+)", name, message)


def misplaced_fields(mm_processor_kwargs: object) -> str | None:
    """Why these start-time processor options are refused: a field of ours is among them."""
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
                instead = (
                    f"for all requests it is {option(name)} "
                    f'(additional_config={{"fsr": {{"{name}": ...}}}})'
                )
            return f"{cut(key)} is no option of the Hugging Face processor; {instead}"
        if isinstance(value, Mapping) and (found := misplaced_fields(value)):
            return found
    return None


def oversized(settings: ServerSettings, given: Iterable[str] = ()) -> str | None:
    """Which cache is larger than the memory it would lie in; None if they fit."""
    device, host = device_memory(), host_memory()
    on_device = (device, "the device") if device is not None else (host, "this machine")
    for name, (memory, where) in (
        ("feature_cache_bytes", on_device),
        ("pixel_cache_bytes", (host, "this machine")),
    ):
        size = getattr(settings, name)
        if memory is not None and size > memory:
            return in_options(
                f"fsr.{name} is {size:,} bytes, more than the {memory:,} bytes of memory that "
                f"{where} has",
                given,
            )
    return None
