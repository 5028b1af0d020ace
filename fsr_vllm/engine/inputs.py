"""Fields of ours on prompts that no surface has judged: refused where they cannot be honoured,
never ignored.

A prompt with images for one of our own processors is left to that processor, which judges it with
the images in hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fsr_vllm.compat.errors import request_error
from fsr_vllm.compat.prompts import wrap_offline_parameters, wrap_prompts
from fsr_vllm.compat.version import why_inactive
from fsr_vllm.params import HOW_TO_ACTIVATE, SETTINGS_KEY, FieldError, RequestFields, ServerSettings
from fsr_vllm.params.misplaced import is_ours

IGNORED_KEY = "fsr_ignored"  # of the model config in a front end: drop fsr fields, prune nothing


def without_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same without our fields."""
    return {key: value for key, value in values.items() if not is_ours(key)}


def install(unsupported: Callable[[Any], str | None]) -> None:
    """Hook the places where all inputs pass, once per process; `unsupported` is
    activation.unsupported.
    """

    def prompt(model_config: Any, given: Mapping[str, Any], has_media: bool) -> Mapping[str, Any]:
        return judged(model_config, given, has_media, unsupported)

    wrap_prompts(prompt)
    wrap_offline_parameters(refuse_extra_args)


def judged(
    model_config: Any,
    given: Mapping[str, Any],
    has_media: bool,
    unsupported: Callable[[Any], str | None],
) -> Mapping[str, Any]:
    """mm_processor_kwargs of one prompt, as it is to be processed. Errors: as of
    `errors.request_error`.
    """
    if not any(map(is_ours, given)):
        return given
    fields = {
        key: value for key, value in given.items() if is_ours(key) and value is not None
    }  # null is absent
    if not fields or getattr(model_config.hf_config, IGNORED_KEY, False):
        return without_fields(given)
    text = getattr(model_config.hf_config, SETTINGS_KEY, None)
    reason = why_inactive(HOW_TO_ACTIVATE) if text is None else unsupported(model_config)
    first = min(fields)
    if reason:
        raise request_error(f"{first}: {reason}", first)
    if has_media:
        return given
    # What the plugin derived is not the client's, and is not judged as such.
    asked = {key: value for key, value in fields.items() if not dataclasses.is_dataclass(value)}
    try:
        RequestFields.parse(asked, ServerSettings.from_json(text))
    except FieldError as error:
        raise request_error(str(error), error.field) from None
    return without_fields(given)


def refuse_extra_args(model_config: Any, extra: Mapping[str, Any]) -> None:
    """Fields in SamplingParams.extra_args, which nobody reads offline; where the plugin is left
    aside they may stay.
    """
    if getattr(model_config.hf_config, IGNORED_KEY, False):
        return
    name = min(
        (key for key, value in extra.items() if is_ours(key) and value is not None), default=None
    )
    if name is not None:
        raise request_error(
            f"{name} is not read in SamplingParams.extra_args: offline it belongs in mm_processor_kwargs, "
            "of the prompt or of LLM.chat",
            name,
        )
