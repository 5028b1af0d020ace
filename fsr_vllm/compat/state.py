"""What this process, or the one that started it, does with the plugin.

Child processes load plugins before they know any configuration, so that they learn it from the
environment: engine cores and workers inherit it, Ray is told to copy it.
"""

from __future__ import annotations

import os

from fsr_vllm.compat.patching import Entry

VARIABLE = "FSR_STATE"
INACTIVE, ACTIVE, IGNORING = "inactive", "active", "ignoring"
RAY = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
RAY_VARIABLES = Entry(
    "vllm.ray.ray_env:get_env_vars_to_copy",
    f"Ray's actors get the variables of vLLM, and those that {RAY} names. A name of ours that "
    "begins with VLLM_ would be copied too, but vLLM warns of variables it does not know.",
    "plugins are told the configuration when they are loaded",
    missing="releases that keep it elsewhere",
    read="0.32",
    run="not with Ray",
)


def state() -> str:
    """The state of the last engine that this process made, or was started for."""
    return os.environ.get(VARIABLE, INACTIVE)


def put_state(new: str) -> None:
    """Set the state, for this process and its children."""
    if new == INACTIVE:
        os.environ.pop(VARIABLE, None)
        return
    os.environ[VARIABLE] = new
    import vllm.envs

    if RAY in vllm.envs.environment_variables:
        named = [name for name in os.environ.get(RAY, "").split(",") if name]
        os.environ[RAY] = ",".join(dict.fromkeys([*named, VARIABLE]))
