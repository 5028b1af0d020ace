"""What the server was told, the cache identity of a planned image, and inputs that carry one plan
per image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any

from vllm.multimodal.processing import ProcessorInputs

from fsr_vllm.compat.identity import mark
from fsr_vllm.params import SELECTION_VERSION, SETTINGS_KEY, ImagePlan, ServerSettings


def read_settings(hf_config: Any) -> ServerSettings | None:
    """The server's settings as put into the model config at start; None while the plugin is not
    active.
    """
    text = getattr(hf_config, SETTINGS_KEY, None)
    return None if text is None else ServerSettings.from_json(text)


def prototype_file(model: str) -> str | None:
    """The codebook beside a model in a local folder (see `fsr_vllm.methods.prototypes`), if it has
    one.
    """
    # In a folder of its own: loaders take every *.safetensors file beside the model for weights of
    # it.
    path = os.path.join(model, "fsr", "prototypes.safetensors")
    return path if os.path.isfile(path) else None


def identity(base: str, plan: ImagePlan, settings: ServerSettings, codebook: str = "") -> str:
    """Cache identity of a planned image; an unpruned one keeps vLLM's own, whoever asked for it and
    how.
    """
    if not plan.pruned:
        return base
    # The encoder and sign shape relevance: they matter where KV blocks outlive this server.
    parts = (
        "fsr",
        str(SELECTION_VERSION),
        str(settings.text_encoder),
        str(settings.relevance_sign),
        codebook,
        base,
    )
    digest = hashlib.sha256("\0".join(parts).encode())
    digest.update(b"\0" + plan.encode())
    return mark(plan.total, digest.hexdigest())


@dataclasses.dataclass
class PlannedInputs(ProcessorInputs):
    """vLLM's processor inputs, without our request fields and with one plan per image."""

    fsr_plans: Sequence[ImagePlan] = ()
    fsr_settings: ServerSettings | None = None
    fsr_codebook: str = ""
    fsr_dummy: bool = False
    fsr_hashes: dict[str, list[str]] | None = None  # vLLM's own, once they are known
    fsr_adaptive: int | None = None

    def get_mm_hashes(self, *args: Any, **kwargs: Any) -> Any:
        """Identities for processor cache, encoder cache and KV blocks: vLLM's own hash, then what
        we keep of it.
        """
        hashes = dict(self.fsr_hashes or super().get_mm_hashes(*args, **kwargs))
        if self.fsr_plans and self.fsr_settings is not None:
            pairs = zip(hashes["image"], self.fsr_plans, strict=True)
            hashes["image"] = [
                identity(base, plan, self.fsr_settings, self.fsr_codebook) for base, plan in pairs
            ]
        return hashes
