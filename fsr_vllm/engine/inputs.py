"""What mm_processor_kwargs ask of us, on every way to a processor: fields are parsed once, and
refused where they cannot be honoured, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping

from fsr_vllm.compat.attributes import IGNORED_KEY
from fsr_vllm.compat.errors import as_request_errors, request_error
from fsr_vllm.compat.front_end import image_limit
from fsr_vllm.compat.prompts import wrap_offline_parameters, wrap_prompts
from fsr_vllm.compat.types import ModelConfig
from fsr_vllm.params import (
    FieldError,
    FsrRequest,
    RequestFields,
    read_settings,
    refusal,
    request_of,
    without_fields,
)
from fsr_vllm.params.misplaced import is_ours, misspelt


def install() -> None:
    """Hook the places where all inputs pass, once per process."""
    wrap_prompts(judged)
    wrap_offline_parameters(refuse_extra_args)


def requested(model_config: ModelConfig, given: Mapping[str, object] | None) -> FsrRequest | None:
    """The request in these mm_processor_kwargs, parsed here unless an earlier stage has; None where
    they hold no field of ours.

    Errors: FieldError for a field that is wrong, or which this server cannot honour.
    """
    found = request_of(given)
    if found is not None or not given:
        return found
    fields = _servable(model_config, given)
    settings = read_settings(model_config.hf_config)
    if not fields or settings is None:
        return None
    return FsrRequest(RequestFields.parse(fields, settings, image_limit(model_config)))


def _servable(model_config: ModelConfig, given: Mapping[str, object]) -> dict[str, object]:
    """Our fields as written; FieldError if none can be honoured, or one is misspelt."""
    fields = {key: value for key, value in given.items() if is_ours(key) and value is not None}
    if not fields:
        return fields
    wrong, reason = misspelt(fields), refusal(model_config.hf_config)
    if reason is not None:
        name = min(fields) if wrong is None else wrong.field
        raise FieldError(name, f"{name}: {reason}")
    if wrong is not None:
        raise wrong
    return fields


def judged(
    model_config: ModelConfig, given: Mapping[str, object], has_media: bool
) -> Mapping[str, object]:
    """mm_processor_kwargs of one prompt, as it is to be processed.

    A prompt with media is left to our processor, which judges fields with the images in hand.
    Errors: as of `errors.request_error`.
    """
    if not any(map(is_ours, given)):
        return given
    if getattr(model_config.hf_config, IGNORED_KEY, False):
        return without_fields(given)
    with as_request_errors(FieldError):
        if has_media:
            parsed = request_of(given) is not None
            return given if parsed or _servable(model_config, given) else without_fields(given)
        requested(model_config, given)
    return without_fields(given)


def refuse_extra_args(model_config: ModelConfig, extra: Mapping[str, object]) -> None:
    """Refuse fields in SamplingParams.extra_args, which nobody reads offline."""
    if getattr(model_config.hf_config, IGNORED_KEY, False):
        return
    name = min(
        (key for key, value in extra.items() if is_ours(key) and value is not None), default=None
    )
    if name is not None:
        raise request_error(
            f"{name} is not read in SamplingParams.extra_args: offline it belongs in "
            "mm_processor_kwargs, of the prompt or of LLM.chat",
            name,
        )
