"""The command line and the engine arguments, on which every start of vLLM passes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from fsr_vllm.compat.patching import Entry, Patch
from fsr_vllm.compat.types import (
    Anything,
    EngineArgs,
    Function,
    HfConfig,
    HfOverrides,
    ModelConfig,
    Namespace,
    Parser,
)

_WHY = (
    "There is no hook for a plugin's own options; `vllm serve`, `LLM()`, run-batch and Ray all "
    "pass this method."
)
_UNTIL = "vLLM offers options of plugins"
ADD_CLI_ARGS = Patch(
    "vllm.engine.arg_utils:EngineArgs.add_cli_args", _WHY, _UNTIL, signature="(parser)"
)
FROM_CLI_ARGS = Patch(
    "vllm.engine.arg_utils:EngineArgs.from_cli_args", _WHY, _UNTIL, signature="(cls, args)"
)
CREATE_MODEL_CONFIG = Patch(
    "vllm.engine.arg_utils:EngineArgs.create_model_config", _WHY, _UNTIL, signature="(self)"
)
PARSE = Patch(
    "vllm.utils.argparse_utils:FlexibleArgumentParser.parse_known_args",
    "Some front ends fail in their own way before engine arguments are built; options of ours are "
    "judged before that, on the one parser that has them.",
    _UNTIL,
    signature="(self)",
    read="0.27-0.32",
)
ASYNC = Entry(
    "vllm.engine.arg_utils:AsyncEngineArgs",
    "Tells the arguments of an API server (also of run-batch and Ray) from those of `LLM()`.",
    "arguments say for which front end they are",
)
GRPC_LAUNCHERS = ("vllm.entrypoints.launchers.grpc_server", "vllm.entrypoints.grpc_server")
GRPC = Entry(
    f"{GRPC_LAUNCHERS[0]}:serve_grpc",
    "vLLM's gRPC servers, known by the name of the running module, have no HTTP side.",
    "they pass the Python front end",
    missing="without the package grpcio",
)


def wrap_engine_args(
    add_cli_args: Callable[[Parser], None],
    from_cli_args: Callable[[Namespace], None],
    before_model_config: Callable[[EngineArgs], None],
    after_model_config: Callable[[EngineArgs, ModelConfig], None],
) -> None:
    """Run our steps around EngineArgs.add_cli_args, from_cli_args and create_model_config."""

    def adding(stock: Function) -> Function:
        def wrapped(parser: Parser, *args: Anything, **kwargs: Anything) -> Parser:
            parser = stock(parser, *args, **kwargs)
            add_cli_args(parser)
            return parser

        return wrapped

    def reading(stock: Function) -> Function:
        def wrapped(cls: type, args: Namespace, *rest: Anything, **kwargs: Anything) -> EngineArgs:
            from_cli_args(args)
            return stock(cls, args, *rest, **kwargs)

        return wrapped

    def creating(stock: Function) -> Function:
        def wrapped(self: EngineArgs, *args: Anything, **kwargs: Anything) -> ModelConfig:
            before_model_config(self)
            model_config = stock(self, *args, **kwargs)
            after_model_config(self, model_config)
            return model_config

        return wrapped

    ADD_CLI_ARGS.apply(adding)
    FROM_CLI_ARGS.apply(reading)
    CREATE_MODEL_CONFIG.apply(creating)


def judge_parsed(parser: Parser, reason: Callable[[Namespace, list[str]], str | None]) -> None:
    """Let reason(namespace, unknown arguments) say why what this parser read is an error."""

    def make(stock: Function) -> Function:
        def parse_known_args(*args: Anything, **kwargs: Anything) -> tuple[Namespace, list[str]]:
            namespace, rest = stock(*args, **kwargs)
            said = reason(namespace, rest)
            if said:
                parser.error(said)
            return namespace, rest

        return parse_known_args

    PARSE.apply(make, owner=parser)


class ComposedOverride:
    """A callable `hf_overrides` of the user, followed by our keys; a class can be pickled."""

    def __init__(self, user: Callable[[HfConfig], HfConfig], keys: dict[str, str]) -> None:
        """`keys` are set after `user` has had the configuration."""
        self.user, self.keys = user, keys

    def __call__(self, config: HfConfig) -> HfConfig:
        """What vLLM does with its configuration."""
        config = self.user(config)
        config.update(self.keys)
        return config


def with_overrides(hf_overrides: HfOverrides, keys: dict[str, str]) -> HfOverrides:
    """`hf_overrides` with our keys: processors see settings in the model config alone."""
    if isinstance(hf_overrides, ComposedOverride):
        hf_overrides = hf_overrides.user
    if callable(hf_overrides):
        return ComposedOverride(hf_overrides, keys)
    return {**(hf_overrides or {}), **keys}


def is_online(engine_args: EngineArgs) -> bool:
    """Whether these arguments are an API server's (or run-batch's, or Ray's), not `LLM()`'s."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    return isinstance(engine_args, AsyncEngineArgs)


def python_front_end_bypassed(args: Namespace) -> str | None:
    """The option that would answer requests outside Python, and so outside our hooks, or None."""
    if getattr(args, "grpc", False):
        return "--grpc"
    if grpc_launcher_runs():
        return "vLLM's gRPC server"
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0").lower() in ("1", "true"):
        return "the Rust front end (VLLM_USE_RUST_FRONTEND=1)"
    return None


def grpc_launcher_runs() -> bool:
    """Whether this process is vLLM's stand-alone gRPC server."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return getattr(spec, "name", None) in GRPC_LAUNCHERS
