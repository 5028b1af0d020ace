"""Tensor and pipeline parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fsr_vllm.compat.patching import Entry

if TYPE_CHECKING:
    import torch

BROADCAST = Entry(
    "vllm.distributed.parallel_state:GroupCoordinator.broadcast",
    "All ranks keep the tokens that rank 0 chose.",
    "never: vLLM's models use it",
    signature="(self, input_, src)",
)
FIRST_RANK = Entry(
    "vllm.distributed.parallel_state:GroupCoordinator.is_first_rank",
    "The first pipeline rank alone has a vision tower.",
    "never: vLLM's models use it",
)


def tensor_parallel_sum(value: torch.Tensor) -> torch.Tensor:
    """All-reduce (sum) over the tensor-parallel group."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(value)


def tensor_parallel_gather(value: torch.Tensor) -> torch.Tensor:
    """The last dimension of all ranks, in rank order: heads in their own order."""
    from vllm.distributed import tensor_model_parallel_all_gather

    return tensor_model_parallel_all_gather(value)


def tensor_parallel_size() -> int:
    """How many ranks share a layer."""
    from vllm.distributed import get_tensor_model_parallel_world_size

    return get_tensor_model_parallel_world_size()


def broadcast_from_first(value: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor on every rank of the tensor-parallel group."""
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group().broadcast(value.contiguous(), src=0)


def has_vision_tower() -> bool:
    """Whether this pipeline rank runs the vision tower: the first one does."""
    from vllm.distributed import get_pp_group

    return get_pp_group().is_first_rank
