"""The command line and the engine arguments, on which every start of vLLM passes."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

GRPC_LAUNCHERS = ("vllm.entrypoints.launchers.grpc_server", "vllm.entrypoints.grpc_server")


def wrap_engine_args(
    add_cli_args: Callable[[Any], None],
    from_cli_args: Callable[[Any], None],
    before_model_config: Callable[[Any], None],
    after_model_config: Callable[[Any, Any], None],
) -> None:
    """Run our steps around EngineArgs.add_cli_args, from_cli_args and create_model_config; safe to
    call twice.

    Why: there is no hook for a plugin's own options, and these three are what `vllm serve`,
    `LLM()`, run-batch and Ray all pass. Same signatures in 0.26-0.33. Can go when vLLM offers
    plugin options.
    """
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, "_fsr_wrapped", False):
        return
    stock_add, stock_from, stock_create = (
        EngineArgs.add_cli_args,
        EngineArgs.from_cli_args.__func__,
        EngineArgs.create_model_config,
    )

    @functools.wraps(stock_add)
    def wrapped_add(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = stock_add(parser, *args, **kwargs)
        add_cli_args(parser)
        return parser

    @functools.wraps(stock_from)
    def wrapped_from(cls: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        from_cli_args(args)
        return stock_from(cls, args, *rest, **kwargs)

    @functools.wraps(stock_create)
    def wrapped_create(self: Any, *args: Any, **kwargs: Any) -> Any:
        before_model_config(self)
        model_config = stock_create(self, *args, **kwargs)
        after_model_config(self, model_config)
        return model_config

    EngineArgs.add_cli_args = staticmethod(wrapped_add)
    EngineArgs.from_cli_args = classmethod(wrapped_from)
    EngineArgs.create_model_config = wrapped_create
    EngineArgs._fsr_wrapped = True


class ComposedOverride:
    """A callable `hf_overrides` of the user, followed by our keys; a class so that it can be
    pickled.
    """

    def __init__(self, user: Callable[[Any], Any], keys: dict[str, Any]) -> None:
        self.user, self.keys = user, keys

    def __call__(self, config: Any) -> Any:
        config = self.user(config)
        config.update(self.keys)
        return config


def with_overrides(hf_overrides: Any, keys: dict[str, Any]) -> Any:
    """`hf_overrides` with our keys added: the way settings reach processors, which see only the
    model config.
    """
    if isinstance(hf_overrides, ComposedOverride):
        hf_overrides = hf_overrides.user
    if callable(hf_overrides):
        return ComposedOverride(hf_overrides, keys)
    return {**(hf_overrides or {}), **keys}


def is_online(engine_args: Any) -> bool:
    """Whether these arguments belong to an API server (also run-batch and Ray) rather than to
    `LLM()`.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    return isinstance(engine_args, AsyncEngineArgs)


def python_front_end_bypassed(args: Any) -> str | None:
    """The option that would answer requests outside Python, and so outside our hooks; None if there
    is none.
    """

    if getattr(args, "grpc", False):
        return "--grpc"
    if grpc_launcher_runs():
        return "vLLM's gRPC server"
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0").lower() in ("1", "true"):
        return "the Rust front end (VLLM_USE_RUST_FRONTEND=1)"
    return None


def grpc_launcher_runs() -> bool:
    """Whether this process is vLLM's stand-alone gRPC server, which has no HTTP side and reads no
    fields of ours.
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return getattr(spec, "name", None) in GRPC_LAUNCHERS
