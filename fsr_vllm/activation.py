"""From what a user asked to what is in force: settings on their way into the model config, and
refusals at start.

A server is inactive (as installed), active, or ignoring (`--fsr-ignore`): then everything is vLLM's
own but for the hooks that drop requests' fsr fields. What each state replaces in vLLM is seen in
`put_settings`; docs/compatibility.md has it as a table.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fsr_vllm.cli_args import misplaced_fields, oversized
from fsr_vllm.compat.attributes import IGNORED_KEY
from fsr_vllm.compat.engine_args import is_online, with_overrides
from fsr_vllm.compat.load import watch_load
from fsr_vllm.compat.outputs import wrap_outputs
from fsr_vllm.compat.plugins import PLUGIN, named_plugins
from fsr_vllm.compat.registry import put_models, put_stock_models
from fsr_vllm.compat.resets import wrap_mm_cache_reset
from fsr_vllm.compat.scheduler import wrap_scheduler
from fsr_vllm.compat.state import ACTIVE, IGNORING, INACTIVE, put_state, state
from fsr_vllm.compat.types import EngineArgs, ModelConfig, Processor, VllmConfig
from fsr_vllm.compat.version import outside_window, steps_aside
from fsr_vllm.engine.families import FAMILIES, family_of

if TYPE_CHECKING:
    from fsr_vllm.params import Budget, ServerSettings

logger = logging.getLogger("vllm.fsr_vllm")


def put_settings(engine_args: EngineArgs) -> None:
    """Before the model config is made: settings into hf_overrides, and our worker extension."""
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
    reason = misplaced_fields(getattr(engine_args, "mm_processor_kwargs", None))
    if reason:
        raise ValueError(f"mm_processor_kwargs: {reason}")
    settings = None if given is None else _settings(given)
    put_models(FAMILIES)
    if settings is None:
        _refuse_fields(engine_args)
    else:
        _activate(engine_args, settings)


def _settings(given: dict[str, Any]) -> ServerSettings:
    """Validated settings; ValueError where they cannot be kept."""
    from fsr_vllm import params

    settings = params.ServerSettings.parse(given)
    too_large = oversized(settings)
    if too_large:
        raise ValueError(f"plugin fsr: {too_large}")
    reason = steps_aside()
    if reason and settings.prunes_by_default:
        raise ValueError(f"{reason}; without it, the default budget could not be kept")
    return settings.model_copy(update={"unsupported": reason})


def _refuse_fields(engine_args: EngineArgs) -> None:
    """Inactive: one hook on each surface, which looks for fields of ours and refuses them."""
    from fsr_vllm.engine import inputs

    put_state(INACTIVE)
    inputs.install()
    if is_online(engine_args):
        from fsr_vllm.server import inactive

        inactive.install()


def _activate(engine_args: EngineArgs, settings: ServerSettings) -> None:
    from fsr_vllm import params
    from fsr_vllm.engine import conversation, inputs
    from fsr_vllm.engine.extension import with_ours

    if settings.adaptive is not None:
        _follow_load(engine_args, settings)
    put_state(ACTIVE)
    overrides = {params.SETTINGS_KEY: settings.model_dump_json()}
    engine_args.hf_overrides = with_overrides(engine_args.hf_overrides, overrides)
    inputs.install()
    conversation.install()
    if is_online(engine_args):
        from fsr_vllm.server import requests

        requests.install(model_alias=settings.model_alias)
    if settings.unsupported is not None:
        logger.warning(
            "fsr_vllm: %s; requests are left alone, those with fsr fields are refused",
            settings.unsupported,
        )
        return
    engine_args.worker_extension_cls = with_ours(engine_args.worker_extension_cls)
    wrap_mm_cache_reset(_forget_pixels)
    wrap_outputs()
    wrap_scheduler(limits_encoder)


def _leave_aside(engine_args: EngineArgs) -> None:
    """Vanilla vLLM, but for hooks that drop what requests say to us."""
    from fsr_vllm import params
    from fsr_vllm.engine import inputs

    if state() != IGNORING:
        logger.warning(
            "fsr_vllm: left aside (fsr.ignore): vLLM serves every image whole; requests' fsr "
            "fields, x-fsr-* headers and @fsr suffixes of model names are dropped unread, other "
            "fsr options are unused"
        )
    put_state(IGNORING)
    put_stock_models()
    if isinstance(engine_args.mm_processor_kwargs, dict):
        engine_args.mm_processor_kwargs = params.without_fields(engine_args.mm_processor_kwargs)
    inputs.install()
    if is_online(engine_args):
        from fsr_vllm.server import ignored

        ignored.install()


def _forget_pixels(processor: Processor) -> None:
    """Clear our cache of preprocessed images: vLLM has just cleared its own of this front end."""
    if getattr(processor, "fsr_pixels", None) is not None:
        processor.fsr_pixels.clear()


def _follow_load(engine_args: EngineArgs, settings: ServerSettings) -> None:
    """Let this process follow the load of its engines; ValueError where there is none to follow."""
    from fsr_vllm import adaptive

    if not is_online(engine_args):
        raise ValueError(
            "fsr.adaptive needs a server: LLM() prepares all its prompts before the first one "
            "runs, so there is no load to follow; set fsr.budget instead"
        )
    if getattr(engine_args, "disable_log_stats", False):
        raise ValueError(
            "fsr.adaptive reads vLLM's statistics: leave out --disable-log-stats, or set fsr.budget"
        )
    low, high = settings.adaptive_range or (0, 0)
    watch_load(adaptive.start(low, high))


def finish_settings(engine_args: EngineArgs, model_config: ModelConfig) -> None:
    """After the model config is made: add what start-up knows, refuse what cannot work."""
    from fsr_vllm import params

    given = params.given_settings(engine_args.additional_config, named=False)
    if params.ignoring(given):
        model_config.hf_config.update({IGNORED_KEY: True})
        return
    settings = params.read_settings(model_config.hf_config)
    if settings is None or settings.unsupported is not None:
        return  # not active, or stepped aside
    _refuse_conflicts(engine_args, model_config)
    settings = settings.model_copy(update=_found(model_config, settings))
    for option, budget in _defaults(settings):
        settings.check_bounds(budget, f"fsr.{option}", settings.tokens_per_image)
    overrides = {params.SETTINGS_KEY: settings.model_dump_json()}
    model_config.hf_config.update(overrides)
    model_config.hf_overrides = with_overrides(model_config.hf_overrides, overrides)
    if settings.unsupported is None:
        family = family_of(model_config.architectures)
        assert family is not None
        logger.info("fsr_vllm: %s", in_force(family.architecture, settings))
        return
    if settings.prunes_by_default:
        raise ValueError(f"plugin fsr: a default budget is set, but {settings.unsupported}")
    logger.warning(
        "fsr_vllm: %s; requests are served unpruned, and requests with fsr fields are refused",
        settings.unsupported,
    )


def _refuse_conflicts(engine_args: EngineArgs, model_config: ModelConfig) -> None:
    """ValueError for an option of vLLM that does not go together with the plugin."""
    if getattr(engine_args, "enable_lora", False) and getattr(
        engine_args, "enable_tower_connector_lora", False
    ):
        # vLLM would warn once, in a worker, and then leave out what an adapter changes in the
        # tower.
        raise ValueError(
            "plugin fsr: --enable-tower-connector-lora does not work together with the plugin, "
            "whose rows vLLM would take for the tower's; start without it (adapters of the "
            "language model work)"
        )
    family = family_of(model_config.architectures)
    reason = None if family is None else family.conflicts(engine_args)
    if reason:
        raise ValueError(f"plugin fsr: {reason}")


def _found(model_config: ModelConfig, settings: ServerSettings) -> dict[str, Any]:
    """What the settings are to say of this model."""
    family = family_of(model_config.architectures)
    if family is None:
        names, known = ", ".join(model_config.architectures), ", ".join(FAMILIES)
        return {"unsupported": f"architecture {names} is not supported (supported: {known})"}
    reason = family.unsupported(model_config.hf_config)
    if reason:
        return {"unsupported": reason}
    from fsr_vllm.engine import text_encoder

    encoder, sign = text_encoder.find_encoder(
        model_config, settings.text_encoder, settings.relevance_sign
    )
    return {
        "text_encoder": encoder,
        "relevance_sign": sign,
        "tokens_per_image": family.most_tokens(model_config.hf_config),
        "one_size": family.one_size,
        "signals": tuple(sorted(family.signals)),
    }


def limits_encoder(vllm_config: VllmConfig) -> bool:
    """Whether a step's encoder work is counted in unpruned tokens; asked for every prompt."""
    from fsr_vllm import params

    settings = params.read_settings(vllm_config.model_config.hf_config)
    return (
        settings is not None
        and settings.unsupported is None
        and settings.encoder_limit == "unpruned"
    )


def _defaults(settings: ServerSettings) -> list[tuple[str, Budget]]:
    """Budgets of requests that do not say, by option; shares are judged by the total."""
    options = [("budget", settings.budget)]
    options += [("detail_budgets", budget) for budget in settings.detail_budgets.values()]
    return [(name, budget) for name, budget in options if budget is not None]


def in_force(architecture: str, settings: ServerSettings) -> str:
    """What the server does, in a sentence for its log."""
    from fsr_vllm import __version__, params
    from fsr_vllm.engine.encoder_source import split_revision

    total = settings.tokens_per_image or 0

    def tokens(budget: Budget) -> str:
        up_to = "" if settings.one_size else "up to "
        if budget == "off":
            return f"all {up_to}{total}"
        return f"{up_to}{params.resolve_budget(budget, total)} of {total}"

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
        f"caches of {settings.feature_cache_bytes:,} (features) and "
        f"{settings.pixel_cache_bytes:,} (pixels) bytes",
    ]
    return "; ".join(parts)
