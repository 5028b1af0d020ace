"""Which text asks about which image, for every surface that has messages; the plugin hands it to the HTTP side."""

from __future__ import annotations

from typing import Any

from fsr_vllm.signals import instruction


def image_questions(messages: Any) -> list[str]:
    """One question per image, in prompt order; contents that can be read only once become lists first."""
    instruction.materialise(messages)
    return instruction.image_questions(messages)


def image_details(messages: Any) -> list[str | None]:
    """The `image_url.detail` of each image, in prompt order."""
    instruction.materialise(messages)
    return instruction.image_details(messages)
