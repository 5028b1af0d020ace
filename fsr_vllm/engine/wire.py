"""What travels from the processor to the model beside an image's pixels: cache key and plan."""

from __future__ import annotations

import hashlib

import torch

from fsr_vllm.params import ImagePlan

PLAN_FIELD = "fsr_plan"  # of the processed inputs: one byte tensor per image
KEY_BYTES = 16


def image_key(identity: str) -> bytes:
    """The cache key of an image, from vLLM's own identity of it (its content or `uuid`, and
    processor options): budget, method and question are no part of it.
    """
    return hashlib.sha256(identity.encode()).digest()[:KEY_BYTES]


def pack_plan(key: bytes | None, plan: ImagePlan) -> torch.Tensor:
    """An image's key and plan as one byte tensor; an image without a key is never cached."""
    data = (key or bytes(KEY_BYTES)) + plan.encode()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def unpack_plan(packed: torch.Tensor) -> tuple[bytes | None, ImagePlan]:
    """The inverse of `pack_plan`."""
    data = packed.cpu().numpy().tobytes()
    key = data[:KEY_BYTES]
    return key if any(key) else None, ImagePlan.decode(data[KEY_BYTES:])
