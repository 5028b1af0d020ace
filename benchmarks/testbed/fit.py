"""The loop of both training stages: a schedule in steps, batches drawn from the step's number,
saved as it goes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

SAVE_SECONDS = 60.0
_LOOK_EVERY = 25


def fit(
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    draw: Callable[[int], Any],
    loss: Callable[[Any], Tensor],
    steps: int,
    state: Path,
    name: str,
    warmup: int = 100,
    workers: int = 0,
) -> float:
    """Train to `steps`; a run that was stopped goes on from `state`, to the same result. Returns
    seconds of training.

    `draw` makes a step's batch from the step's number alone, in `workers` processes if there are
    any; `loss` takes it. The rate follows a cosine after `warmup`.
    """
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    start, before = 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        module.load_state_dict(saved["module"])
        for optimizer, content in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        start, before = saved["step"], saved["seconds"]
    groups = [
        group for optimizer in optimizers for group in optimizer.param_groups
    ]  # loading made new ones
    began = last = time.monotonic()
    batches = DataLoader(_Steps(draw, start, steps), batch_size=None, num_workers=workers)
    bar = tqdm(batches, desc=name, unit="step", initial=start, total=steps, mininterval=2)
    mean = None
    for step, batch in enumerate(bar, start):
        factor = min(1.0, (step + 1) / warmup) * (
            0.02 + 0.49 * (1 + math.cos(math.pi * step / steps))
        )
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        value = loss(batch)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        mean = value.detach() if mean is None else 0.98 * mean + 0.02 * value.detach()
        if step % _LOOK_EVERY == 0 or step + 1 == steps:  # looking waits for the device
            bar.set_postfix(loss=f"{float(mean):.3f}", refresh=False)
            if not math.isfinite(mean):
                raise RuntimeError(f"{name}: the loss is {value.item()} at step {step}")
        if time.monotonic() - last > SAVE_SECONDS or step + 1 == steps:
            last = time.monotonic()
            _save(module, optimizers, step + 1, before + last - began, state)
    return before + time.monotonic() - began


class _Steps(Dataset):
    """What `draw` makes of the steps that are left."""

    def __init__(self, draw: Callable[[int], Any], start: int, stop: int) -> None:
        self.draw, self.start, self.stop = draw, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Any:
        return self.draw(self.start + index)


def adamw(parameters: Sequence[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """AdamW; only matrices decay."""
    matrices = [p for p in parameters if p.ndim > 1]
    rest = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def _save(
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    seconds: float,
    state: Path,
) -> None:
    """Write beside the old state, then take its place: a run that is killed here loses nothing."""
    content = {"module": module.state_dict(), "step": step, "seconds": seconds}
    unfinished = state.with_suffix(".part")
    torch.save(
        content | {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}, unfinished
    )
    unfinished.rename(state)
