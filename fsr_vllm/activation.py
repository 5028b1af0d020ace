"""From what a user asked to what is in force: settings on their way into the model config, and
refusals at start.

A server is inactive (as installed), active, or ignoring (`--fsr-ignore`): then everything is vLLM's
own but for the hooks that drop requests' fsr fields.
"""

from __future__ import annotations

import logging
from typing import Any

from fsr_vllm.cli_args import misplaced_fields, oversized
from fsr_vllm.compat.engine_args import is_online, with_overrides
from fsr_vllm.compat.load import watch_load
from fsr_vllm.compat.outputs import wrap_outputs
from fsr_vllm.compat.plugins import PLUGIN, named_plugins
from fsr_vllm.compat.registry import leave_aside, take_up
from fsr_vllm.compat.resets import wrap_mm_cache_reset
from fsr_vllm.compat.version import native_field, outside_window, why_inactive
from fsr_vllm.engine.families import FAMILIES, family_of

logger = logging.getLogger("vllm.fsr_vllm")


def put_settings(engine_args: Any) -> None:
    """Before the model config is made: validated settings into hf_overrides, and our worker
    extension.
    """
    from fsr_vllm import params

    given = params.given_settings(engine_args.additional_config, PLUGIN in named_plugins())
    if params.ignoring(given):
        _leave_aside(engine_args)
        return
    outside = outside_window()
    if outside:
        if given is not None:
            raise ValueError(outside)
        return
    take_up(FAMILIES)
    reason = misplaced_fields(getattr(engine_args, "mm_processor_kwargs", None))
    if reason:
        raise ValueError(f"mm_processor_kwargs: {reason}")
    settings = _settings(given)
    if settings is not None:
        _activate(engine_args, settings)
    from fsr_vllm.engine import conversation, inputs

    inputs.install(unsupported)
    conversation.install(unsupported)
    if is_online(engine_args):
        from fsr_vllm.server import requests

        requests.install(unsupported, model_alias=settings is not None and settings.model_alias)


def _settings(given: dict[str, Any] | None) -> Any:
    """Validated settings; None where the plugin is not active, or steps aside for a budget of
    vLLM's own.
    """
    from fsr_vllm import params

    if given is None:
        return None
    settings = params.ServerSettings.parse(given)
    too_large = oversized(settings)
    if too_large:
        raise ValueError(f"plugin fsr: {too_large}")
    if not native_field():
        return settings
    reason = why_inactive(params.HOW_TO_ACTIVATE)
    if settings.prunes_by_default:
        raise ValueError(f"{reason}; without it, the default budget could not be kept")
    logger.warning(
        "fsr_vllm: %s; requests are left alone, those with fsr fields are refused", reason
    )
    return None


def _activate(engine_args: Any, settings: Any) -> None:
    from fsr_vllm import params
    from fsr_vllm.engine.extension import with_ours

    if settings.adaptive is not None:
        _follow_load(engine_args, settings)
    overrides = {params.SETTINGS_KEY: settings.model_dump_json()}
    engine_args.hf_overrides = with_overrides(engine_args.hf_overrides, overrides)
    engine_args.worker_extension_cls = with_ours(engine_args.worker_extension_cls)
    wrap_mm_cache_reset(_forget_pixels)
    wrap_outputs()


def _leave_aside(engine_args: Any) -> None:
    """Vanilla vLLM, but for hooks that drop what requests say to us."""
    from fsr_vllm.engine import inputs

    if leave_aside():
        logger.warning(
            "fsr_vllm: left aside (fsr.ignore): vLLM serves every image whole; requests' fsr fields, x-fsr-* headers "
            "and @fsr suffixes of model names are dropped unread, other fsr options are unused"
        )
    if isinstance(engine_args.mm_processor_kwargs, dict):
        engine_args.mm_processor_kwargs = inputs.without_fields(engine_args.mm_processor_kwargs)
    inputs.install(unsupported)
    if is_online(engine_args):
        from fsr_vllm.server import ignored

        ignored.install()


def _forget_pixels(processor: Any) -> None:
    """vLLM's multimodal cache was reset in this front end: so is ours."""
    if getattr(processor, "fsr_pixels", None) is not None:
        processor.fsr_pixels.clear()


def _follow_load(engine_args: Any, settings: Any) -> None:
    """Let this process follow the load of its engines; ValueError where there is nothing to follow."""
    from fsr_vllm import adaptive

    if not is_online(engine_args):
        raise ValueError(
            "fsr.adaptive needs a server: LLM() prepares all its prompts before the first one runs, so there is no "
            "load to follow; set fsr.budget instead"
        )
    if getattr(engine_args, "disable_log_stats", False):
        raise ValueError(
            "fsr.adaptive reads vLLM's statistics: leave out --disable-log-stats, or set fsr.budget"
        )
    watch_load(adaptive.start(*settings.adaptive_range))


def finish_settings(engine_args: Any, model_config: Any) -> None:
    """After the model config is made: find the text encoder, refuse what cannot work, say what is
    in force.
    """
    from fsr_vllm import params

    given = params.given_settings(engine_args.additional_config, named=False)
    if params.ignoring(given):
        from fsr_vllm.engine.inputs import IGNORED_KEY

        setattr(model_config.hf_config, IGNORED_KEY, True)
        return
    if getattr(model_config.hf_config, params.SETTINGS_KEY, None) is None:
        return  # not active, or stepped aside
    settings = params.ServerSettings.model_validate_json(
        getattr(model_config.hf_config, params.SETTINGS_KEY)
    )
    if getattr(engine_args, "enable_lora", False) and getattr(
        engine_args, "enable_tower_connector_lora", False
    ):
        # vLLM would warn once, in a worker, and then leave out what an adapter changes in the
        # tower.
        raise ValueError(
            "plugin fsr: --enable-tower-connector-lora does not work together with the plugin, whose rows vLLM would "
            "take for the tower's; start without it (adapters of the language model work)"
        )
    reason = unsupported(model_config)
    if reason:
        if settings.prunes_by_default:
            raise ValueError(f"plugin fsr: a default budget is set, but {reason}")
        logger.warning(
            "fsr_vllm: %s; requests are served unpruned, and requests with fsr fields are refused",
            reason,
        )
        return
    from fsr_vllm.engine import text_encoder

    encoder, sign = text_encoder.find_encoder(
        model_config, settings.text_encoder, settings.relevance_sign
    )
    family = family_of(model_config.architectures)
    assert family is not None
    name = family.architecture
    found = {
        "text_encoder": encoder,
        "relevance_sign": sign,
        "tokens_per_image": family.most_tokens(model_config.hf_config),
    }
    settings = settings.model_copy(update=found)
    for option, budget in _defaults(settings):
        settings.check_bounds(budget, f"fsr.{option}", settings.tokens_per_image)
    overrides = {params.SETTINGS_KEY: settings.model_dump_json()}
    model_config.hf_config.update(overrides)
    model_config.hf_overrides = with_overrides(model_config.hf_overrides, overrides)
    logger.info("fsr_vllm: %s", in_force(name, settings))


def limits_encoder(vllm_config: Any) -> bool:
    """Whether a step's encoder work is counted in unpruned tokens; asked in the engine core, for
    every new prompt.
    """
    from fsr_vllm import params

    text = getattr(vllm_config.model_config.hf_config, params.SETTINGS_KEY, None)
    if text is None or params.ServerSettings.from_json(text).encoder_limit != "unpruned":
        return False
    return unsupported(vllm_config.model_config) is None


def _defaults(settings: Any) -> list[tuple[str, Any]]:
    """What requests that do not say may get, by option: shares can be judged once an image's tokens
    are known.
    """
    given = [] if settings.budget is None else [("budget", settings.budget)]
    return [*given, *(("detail_budgets", budget) for budget in settings.detail_budgets.values())]


def in_force(architecture: str, settings: Any) -> str:
    """What the server does, in a sentence for its log."""
    from fsr_vllm import __version__, params
    from fsr_vllm.engine.encoder_source import split_revision

    total = settings.tokens_per_image

    def tokens(budget: Any) -> str:
        if budget == "off":
            return f"all {total}"
        return f"{params.resolve_budget(budget, total)} of {total}"

    low, high = settings.min_budget, settings.max_budget
    default = f"by default {tokens(settings.default_budget)} visual tokens per image"
    if settings.adaptive_range is not None:
        low_load, at_rest = settings.adaptive_range
        default = f"by default {at_rest} to {low_load} of {total} visual tokens per image, by load"
    limits = (
        f"requests may ask for {low or 1} to {high}"
        if high
        else f"requests may ask for {low or 1} or more"
    )
    details = ", ".join(
        f"{detail}: {tokens(budget)}" for detail, budget in settings.detail_budgets.items()
    )
    encoder = {"llm": "the language model's embeddings"}.get(
        settings.text_encoder, settings.text_encoder
    )
    name, commit = split_revision(encoder)
    parts = [
        f"{__version__} is active for {architecture}: {default}",
        limits,
        *([f"by image detail {details}"] if details else []),
        f"method {settings.method}",
        f"text encoder {name} at commit {commit}" if commit else f"text encoder {name}",
        f"caches of {settings.feature_cache_bytes:,} (features) and {settings.pixel_cache_bytes:,} (pixels) bytes",
    ]
    return "; ".join(parts)


def unsupported(model_config: Any) -> str | None:
    """Why this model's images cannot be pruned, or None."""
    family = family_of(model_config.architectures)
    if family is not None:
        return family.unsupported(model_config.hf_config)
    names = ", ".join(model_config.architectures)
    return f"architecture {names} is not supported (supported: {', '.join(FAMILIES)})"
