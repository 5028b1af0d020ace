"""The only place that touches names vLLM does not promise to keep.

Each entry says why it is needed, in which versions it was read or run, and when it can go.
`tests/compat` fails when one of them moves. Supported window: see `dependencies` in pyproject.toml.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

PLUGIN = "fsr"

# Groups that vLLM loads by itself while VLLM_PLUGINS is unset; endpoint plugins always wait to be
# named.
AUTO_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
ENDPOINT_GROUP = "vllm.endpoint_plugins"


# --- plugin selection: documented variable, undocumented side effect ------------------------------


def installed_plugins() -> list[str]:
    """Names of all installed vLLM plugins, of every group."""
    return sorted(
        {
            entry.name
            for group in (*AUTO_GROUPS, ENDPOINT_GROUP)
            for entry in entry_points(group=group)
        }
    )


def named_plugins() -> list[str]:
    """What VLLM_PLUGINS names; empty when it is unset."""
    value = os.environ.get("VLLM_PLUGINS")
    return [] if value is None else [name.strip() for name in value.split(",")]


def enable_plugins(names: Iterable[str]) -> None:
    """Add to VLLM_PLUGINS, which child processes and Ray inherit.

    Why: setting it to our name alone would switch off every other plugin (LoRA resolvers,
    platforms), since the variable filters all groups. Unset means "all but endpoint plugins", so
    that is spelled out first. Read in 0.26-0.33. Can go when vLLM has an additive option of its
    own.
    """
    names = list(names)
    current = named_plugins()
    if "VLLM_PLUGINS" not in os.environ:
        opens_endpoint = {entry.name for entry in entry_points(group=ENDPOINT_GROUP)}
        loaded = {entry.name for group in AUTO_GROUPS for entry in entry_points(group=group)}
        current = sorted(loaded - opens_endpoint)
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*current, *names]))


# --- command line and engine arguments ------------------------------------------------------------


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
    from fsr_vllm.compat_surfaces import grpc_launcher_runs

    if getattr(args, "grpc", False):
        return "--grpc"
    if grpc_launcher_runs():
        return "vLLM's gRPC server"
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0").lower() in ("1", "true"):
        return "the Rust front end (VLLM_USE_RUST_FRONTEND=1)"
    return None


# --- requests -------------------------------------------------------------------------------------


@functools.cache
def request_error_class() -> type[Exception]:
    """The class of `request_error`: made when first needed, since importing vllm here would cost
    every process.
    """
    from vllm.exceptions import VLLMValidationError

    # Also a ValueError, which VLLMValidationError was until 0.30: offline callers catch that.
    return type("FsrRequestError", (VLLMValidationError, ValueError), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    if name == "FsrRequestError":  # how pickle finds it, in whatever process an error arrives
        return request_error_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def request_error(message: str, field: str) -> Exception:
    """A client error: HTTP 400 in vLLM's OpenAI shape with `param`, a ValueError offline; a long
    name is cut.
    """
    message, field = message.replace(field, field[:80]), field[:80]
    return request_error_class()(message, parameter=field)  # type: ignore[call-arg]


# --- load -----------------------------------------------------------------------------------------

_load_readers: list[Callable[[int, int, int, float], None]] = []


def watch_load(read: Callable[[int, int, int, float], None]) -> None:
    """Call `read(engine, running, waiting, kv_usage)` with what each engine reports after its
    steps; last call counts.

    Why: StatLoggerManager.record is where every front end (HTTP, run-batch, Ray) gets its engines'
    scheduler figures. vLLM's stat-logger plugins see the same, but one that is installed turns
    statistics on in servers that do not use it. Read in 0.32; num_skipped_waiting_reqs is newer
    than the window. Can go when vLLM offers its load to plugins.
    """
    from vllm.v1.metrics.loggers import StatLoggerManager

    _load_readers[:] = [read]
    if getattr(StatLoggerManager, "_fsr_wrapped", False):
        return
    stock = StatLoggerManager.record

    @functools.wraps(stock)
    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        stats = kwargs.get("scheduler_stats", args[0] if args else None)
        if stats is None:
            return
        waiting = stats.num_waiting_reqs + getattr(stats, "num_skipped_waiting_reqs", 0)
        for reader in _load_readers:
            reader(
                kwargs.get("engine_idx") or 0, stats.num_running_reqs, waiting, stats.kv_cache_usage
            )

    StatLoggerManager.record = record
    StatLoggerManager._fsr_wrapped = True


# --- processor ------------------------------------------------------------------------------------


def stock_factories(model_class: type) -> Any:
    """The (info, processor, dummy_inputs) factories a vLLM model class was registered with.
    Attribute in 0.26-0.33.
    """
    return model_class._processor_factory  # type: ignore[attr-defined]


def mm_items_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The MultiModalDataItems among the arguments of `_apply_hf_processor_main`, whose signature
    changed twice.
    """
    from vllm.multimodal.parse import MultiModalDataItems

    return next(
        value for value in (*args, *kwargs.values()) if isinstance(value, MultiModalDataItems)
    )


def processed_data_of(result: Any) -> Any:
    """The BatchFeature in what `_apply_hf_processor_main` returns: a tuple until 0.28, the data
    itself since 0.30.
    """
    if not isinstance(result, tuple):
        return result
    from transformers import BatchFeature

    return next(value for value in result if isinstance(value, BatchFeature))


# --- model ----------------------------------------------------------------------------------------


def tower_attentions(vision_tower: nn.Module) -> list[nn.Module]:
    """The attention ops of a CLIP tower's computed blocks: called with (query, key, value), each
    (B, 1+N, heads*dim).

    Why: it sees the q and k vLLM computed anyway, behind LoRA wrappers and quantisation. Attributes
    num_heads, head_size and scale are the local ones under tensor parallelism. Read in 0.26-0.33.
    """
    return [block.self_attn.attn for block in vision_tower.vision_model.encoder.layers]  # type: ignore[union-attr]


def weight_source(path: str, revision: str | None, prefix: str) -> Any:
    """A second checkpoint that the default loader reads after the model's own (as vLLM's ultravox
    does).
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    return DefaultModelLoader.Source(path, revision=revision, prefix=prefix)


def load_parameter(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Fill a parameter by its loader: while weights are reloaded vLLM puts one there, and a copy
    would be lost.
    """
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)


def tensor_parallel_sum(value: torch.Tensor) -> torch.Tensor:
    """All-reduce (sum) over the tensor-parallel group."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(value)


def tensor_parallel_gather(value: torch.Tensor) -> torch.Tensor:
    """The last dimension of all ranks, in rank order: heads in their own order."""
    from vllm.distributed import tensor_model_parallel_all_gather

    return tensor_model_parallel_all_gather(value)


def tensor_parallel_size() -> int:
    from vllm.distributed import get_tensor_model_parallel_world_size

    return get_tensor_model_parallel_world_size()


def broadcast_from_first(value: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor on every rank of the tensor-parallel group."""
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group().broadcast(value.contiguous(), src=0)


def embed_text_ids(language_model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The language model's input embeddings of token ids."""
    return language_model.embed_input_ids(ids)  # type: ignore[operator]


def tokenizer_of(model_config: Any) -> Any:
    """The served model's tokenizer. Import path in 0.26-0.33."""
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(model_config)


def front_end_processor(llm: Any) -> Any:
    """The multimodal processor inside an offline `LLM`'s own process."""
    return llm.llm_engine.renderer.get_mm_processor()
