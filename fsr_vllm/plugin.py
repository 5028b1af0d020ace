"""The one entry point vLLM calls, in every process: registers models and wraps the three places
settings pass.

Importing this module and calling `register()` must stay cheap and safe to repeat: the API server,
the engine core, every worker and vLLM's model inspection load it before any configuration exists.
"""

from __future__ import annotations

import logging

from fsr_vllm import activation, cli_args
from fsr_vllm.compat.engine_args import wrap_engine_args
from fsr_vllm.compat.plugins import PLUGIN, named_plugins
from fsr_vllm.compat.registry import inherited_ignoring, put_models
from fsr_vllm.compat.scheduler import wrap_scheduler
from fsr_vllm.compat.version import outside_window
from fsr_vllm.engine.families import FAMILIES

logger = logging.getLogger("vllm.fsr_vllm")


def register() -> None:
    """Entry point `vllm.general_plugins: fsr`."""
    outside = outside_window()
    if outside is None and not inherited_ignoring():
        put_models(FAMILIES)
        wrap_scheduler(activation.limits_encoder)
    try:
        wrap_engine_args(
            cli_args.add_cli_args,
            cli_args.merge_cli_args,
            activation.put_settings,
            activation.finish_settings,
        )
    except (ImportError, AttributeError) as error:
        if outside is None:
            raise
        if PLUGIN in named_plugins():
            raise RuntimeError(outside) from error
        logger.warning("fsr_vllm: %s", outside)  # nobody asked for it: vLLM is left as it is
