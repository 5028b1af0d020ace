"""Which plugins vLLM loads: a documented variable with an undocumented side effect."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.metadata import entry_points

from fsr_vllm.compat.patching import Entry

PLUGIN = "fsr"
LOADING = Entry(
    "vllm.plugins:load_plugins_by_group",
    "VLLM_PLUGINS filters all groups: our name alone would switch off every other plugin (LoRA "
    "resolvers, platforms). Unset means all but endpoint plugins, which is spelled out before "
    "anything is added.",
    "vLLM has an additive option of its own",
    signature="(group)",
    link="https://github.com/vllm-project/vllm/issues/46565",
)


# Groups that vLLM loads by itself while VLLM_PLUGINS is unset; endpoint plugins always wait to be
# named.
AUTO_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
ENDPOINT_GROUP = "vllm.endpoint_plugins"


def installed_plugins() -> list[str]:
    """Names of all installed vLLM plugins, of every group."""
    groups = (*AUTO_GROUPS, ENDPOINT_GROUP)
    return sorted({entry.name for group in groups for entry in entry_points(group=group)})


def named_plugins() -> list[str]:
    """What VLLM_PLUGINS names; empty when it is unset."""
    value = os.environ.get("VLLM_PLUGINS")
    return [] if value is None else [name.strip() for name in value.split(",")]


def enable_plugins(names: Iterable[str]) -> None:
    """Add to VLLM_PLUGINS, which child processes and Ray inherit."""
    names = list(names)
    current = named_plugins()
    if "VLLM_PLUGINS" not in os.environ:
        opens_endpoint = {entry.name for entry in entry_points(group=ENDPOINT_GROUP)}
        loaded = {entry.name for group in AUTO_GROUPS for entry in entry_points(group=group)}
        current = sorted(loaded - opens_endpoint)
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*current, *names]))
