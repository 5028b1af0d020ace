"""Runs calls of the public loops with the Triton kernels under Triton's interpreter: python
interpret.py CALLS ANSWERS.

A process of its own, since Triton decides when a kernel is defined whether it is interpreted.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from fsr_vllm import kernels


def main(calls: str, answers: str) -> None:
    torch.save(
        [
            getattr(kernels, name)(*args, **kwargs, backend="triton")
            for name, args, kwargs in torch.load(calls)
        ],
        answers,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
