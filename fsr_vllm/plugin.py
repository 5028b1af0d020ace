"""The one entry point vLLM calls, in every process: registers models and wraps the three places
settings pass.

Importing this module and calling `register()` must stay cheap and safe to repeat: the API server,
the engine core, every worker and vLLM's model inspection load it before any configuration exists.
"""

from __future__ import annotations

import logging

from fsr_vllm import activation, cli_args, compat, compat_scheduler, compat_start, compat_version
from fsr_vllm.engine.models import FAMILIES

logger = logging.getLogger("vllm.fsr_vllm")


def register() -> None:
    """Entry point `vllm.general_plugins: fsr`."""
    outside = compat_version.outside_window()
    if outside is None and not compat_start.inherited_ignoring():
        compat_start.put_models(FAMILIES)
        compat_scheduler.wrap_scheduler(activation.limits_encoder)
    try:
        compat.wrap_engine_args(
            cli_args.add_cli_args,
            cli_args.merge_cli_args,
            activation.put_settings,
            activation.finish_settings,
        )
    except (ImportError, AttributeError) as error:
        if outside is None:
            raise
        if compat.PLUGIN in compat.named_plugins():
            raise RuntimeError(outside) from error
        logger.warning("fsr_vllm: %s", outside)  # nobody asked for it: vLLM is left as it is
