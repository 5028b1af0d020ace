"""The one entry point vLLM calls, in every process: registers models and wraps the three places settings pass.

Importing this module and calling `register()` must stay cheap and safe to repeat: the API server, the engine core,
every worker and vLLM's model inspection load it before any configuration exists.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
from typing import Any

from fsr_vllm import compat, compat_scheduler, compat_version
from fsr_vllm.engine.models import FAMILIES

logger = logging.getLogger("vllm.fsr_vllm")

CLI_KEYS = (
    "budget", "adaptive", "min_budget", "max_budget", "method", "text_encoder", "relevance_sign", "detail_budgets",
    "feature_cache_bytes", "pixel_cache_bytes", "model_alias", "encoder_limit",
)  # fmt: skip


def register() -> None:
    """Entry point `vllm.general_plugins: fsr`."""
    outside = compat_version.outside_window()
    if outside is None:
        from vllm import ModelRegistry

        for architecture, target in FAMILIES.items():
            ModelRegistry.register_model(architecture, target)
        compat_scheduler.wrap_scheduler(_limits_encoder)
    try:
        compat.wrap_engine_args(add_cli_args, merge_cli_args, put_settings, finish_settings)
    except (ImportError, AttributeError) as error:
        if outside is None:
            raise
        if compat.PLUGIN in compat.named_plugins():
            raise RuntimeError(outside) from error
        logger.warning("fsr_vllm: %s", outside)  # nobody asked for it: vLLM is left as it is


def _limits_encoder(vllm_config: Any) -> bool:
    """Whether a step's encoder work is counted in unpruned tokens; asked in the engine core, for every new prompt."""
    from fsr_vllm import params

    text = getattr(vllm_config.model_config.hf_config, params.SETTINGS_KEY, None)
    if text is None or params.ServerSettings.from_json(text).encoder_limit != "unpruned":
        return False
    return unsupported(vllm_config.model_config) is None


# --- command line ---------------------------------------------------------------------------------------------------


class PluginAction(argparse.Action):
    """`--plugin NAME[,NAME]`: names installed plugins before any child process starts."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        names = [name.strip() for name in str(values).split(",") if name.strip()]
        installed = compat.installed_plugins()
        for name in names:
            if name not in installed:
                raise argparse.ArgumentError(
                    self, f"no vLLM plugin named {name!r} is installed (installed: {', '.join(installed)})"
                )
        compat.enable_plugins(names)
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest, None) or []), *names])


def _budget(text: str) -> Any:
    from fsr_vllm import params

    try:
        return params.parse_budget(json.loads(text) if text != "off" else text, "--fsr-budget")
    except (params.FieldError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _range(text: str) -> str:
    from fsr_vllm import params

    try:
        params.parse_range(text, "--fsr-adaptive")
    except params.FieldError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def add_cli_args(parser: Any) -> None:
    """Add `--plugin` and the `--fsr-*` options; another package may already have brought `--plugin`."""
    group = parser.add_argument_group("Plugins", "Options of installed vLLM plugins (fsr-vllm).")
    try:
        group.add_argument(
            "--plugin",
            action=PluginAction,
            metavar="NAME[,NAME]",
            help="Activate installed vLLM plugins, in addition to VLLM_PLUGINS. Repeatable.",
        )
    except argparse.ArgumentError:
        logger.debug("--plugin is already defined")
    add = group.add_argument
    add("--fsr-budget", type=_budget, help="Visual tokens kept per image when a request does not say: a number of "
        'tokens, a share between 0 and 1, or "off" (default).')  # fmt: skip
    # The value is optional to argparse alone: without it, the message is ours.
    add("--fsr-adaptive", type=_range, nargs="?", const="", metavar="LOW:HIGH", help="Default budget that follows "
        "the load: HIGH visual tokens per image at rest, down to LOW when requests queue or KV fills.")  # fmt: skip
    add("--fsr-min-budget", type=int, help="Smallest budget a request may ask for.")
    add("--fsr-max-budget", type=int, help="Largest budget a request may ask for; vLLM profiles with it.")
    add("--fsr-method", help="Method used when a request does not say (default: fsr). See `fsr-vllm methods`.")
    add("--fsr-text-encoder", help="CLIP text tower for query relevance: auto, a path or model name, llm, or none.")
    add("--fsr-relevance-sign", help="Sign of the tower's patch-text cosine: auto, 1 or -1.")
    add("--fsr-detail-budgets", type=json.loads, help="Budgets for image_url.detail, e.g. '{\"low\": 64}'.")
    add("--fsr-feature-cache-bytes", type=int, help="Vision features kept in each worker, so that a known image is "
        "not encoded again for another question, budget or method (default 268435456, 0 = off).")  # fmt: skip
    add("--fsr-pixel-cache-bytes", type=int, help="Preprocessed images kept in each API server, by image alone "
        "(default 268435456, 0 = off).")  # fmt: skip
    add("--fsr-model-alias", action="store_true", default=None, help="Serve every model and adapter name with a budget "
        "behind it too, such as NAME@fsr128, NAME@fsr0.25 or NAME@fsroff.")  # fmt: skip
    add("--fsr-encoder-limit", choices=("unpruned", "kept"), help="What a pruned image counts in vLLM's limit on "
        "encoder work per step: its unpruned tokens (default), so that many small budgets never keep others waiting "
        "longer than without pruning, or the kept ones, for throughput of one's own batches.")  # fmt: skip
    parse = parser.parse_known_args

    def parse_and_check(*args: Any, **kwargs: Any) -> Any:
        # Some front ends fail in their own way before they build engine arguments; ours is the clearer message.
        namespace, rest = parse(*args, **kwargs)
        reason = conflict(namespace)
        if reason:
            parser.error(reason)
        return namespace, rest

    parser.parse_known_args = parse_and_check


def conflict(args: Any) -> str | None:
    """What speaks against these parsed options, or None."""
    given = [key for key in CLI_KEYS if getattr(args, f"fsr_{key}", None) is not None]
    active = compat.PLUGIN in compat.named_plugins() or "fsr" in (getattr(args, "additional_config", None) or {})
    outside = compat_version.outside_window() if active else None
    if outside:
        return outside
    if given and not active:
        from fsr_vllm.params import HOW_TO_ACTIVATE

        return f"--fsr-{given[0].replace('_', '-')} needs the plugin: {HOW_TO_ACTIVATE}"
    bypass = compat.python_front_end_bypassed(args) if active else None
    if bypass:
        return f"{bypass} answers requests outside the Python front end, where plugin fsr cannot work"
    return None


def merge_cli_args(args: Any) -> None:
    """Move `--fsr-*` values into additional_config, vLLM's own channel, which child processes get with their args."""
    reason = conflict(args)  # again: a namespace need not come from our parser
    if reason:
        raise SystemExit(f"vllm: error: {reason}")
    given = {key: getattr(args, f"fsr_{key}", None) for key in CLI_KEYS}
    given = {key: value for key, value in given.items() if value is not None}
    if "fsr" in (getattr(args, "additional_config", None) or {}):
        compat.enable_plugins([compat.PLUGIN])  # of a server: additional_config alone must also open the HTTP face
    if given:
        additional = dict(getattr(args, "additional_config", None) or {})
        args.additional_config = {**additional, "fsr": {**(additional.get("fsr") or {}), **given}}


# --- settings -------------------------------------------------------------------------------------------------------


def _given(engine_args: Any) -> dict[str, Any] | None:
    """This server's fsr settings as given; None while the plugin is not active."""
    additional = engine_args.additional_config
    if isinstance(additional, dict) and "fsr" in additional:
        given = additional["fsr"] or {}
        if not isinstance(given, dict):
            raise ValueError(f'additional_config["fsr"] must be an object of options; got {type(given).__name__}')
        return dict(given)
    return {} if compat.PLUGIN in compat.named_plugins() else None


def put_settings(engine_args: Any) -> None:
    """Before the model config is made: validated settings into hf_overrides, and our worker extension."""
    from fsr_vllm import compat_caches, params

    given = _given(engine_args)
    outside = compat_version.outside_window()
    if outside:
        if given is not None:
            raise ValueError(outside)
        return
    if given is not None:
        settings = params.ServerSettings.parse(given)
        if compat_version.native_field():
            reason = compat_version.why_inactive(params.HOW_TO_ACTIVATE)
            if settings.prunes_by_default:
                raise ValueError(f"{reason}; without it, the default budget could not be kept")
            logger.warning("fsr_vllm: %s; requests are left alone, those with fsr fields are refused", reason)
            given = None
    if given is not None:
        if settings.adaptive is not None:
            _follow_load(engine_args, settings)
        overrides = {params.SETTINGS_KEY: settings.model_dump_json()}
        engine_args.hf_overrides = compat.with_overrides(engine_args.hf_overrides, overrides)
        from fsr_vllm.engine.extension import with_ours

        engine_args.worker_extension_cls = with_ours(engine_args.worker_extension_cls)
        compat_caches.wrap_mm_cache_reset(_forget_pixels)
    from fsr_vllm.engine import conversation

    conversation.install(unsupported)
    if compat.is_online(engine_args):
        from fsr_vllm.server import requests

        requests.install(unsupported, model_alias=given is not None and settings.model_alias)


def _forget_pixels(processor: Any) -> None:
    """vLLM's multimodal cache was reset in this front end: so is ours."""
    if getattr(processor, "fsr_pixels", None) is not None:
        processor.fsr_pixels.clear()


def _follow_load(engine_args: Any, settings: Any) -> None:
    """Let this process follow the load of its engines; ValueError where there is nothing to follow."""
    from fsr_vllm import adaptive

    if not compat.is_online(engine_args):
        raise ValueError(
            "fsr.adaptive needs a server: LLM() prepares all its prompts before the first one runs, so there is no "
            "load to follow; set fsr.budget instead"
        )
    if getattr(engine_args, "disable_log_stats", False):
        raise ValueError("fsr.adaptive reads vLLM's statistics: leave out --disable-log-stats, or set fsr.budget")
    compat.watch_load(adaptive.start(*settings.adaptive_range))


def finish_settings(engine_args: Any, model_config: Any) -> None:
    """After the model config is made: find the text encoder, refuse what cannot work, say what is in force."""
    from fsr_vllm import params

    if getattr(model_config.hf_config, params.SETTINGS_KEY, None) is None:
        return  # not active, or stepped aside
    from fsr_vllm.engine import text_tower

    settings = params.ServerSettings.model_validate_json(getattr(model_config.hf_config, params.SETTINGS_KEY))
    family = next((name for name in model_config.architectures if name in FAMILIES), None)
    if getattr(engine_args, "enable_lora", False) and getattr(engine_args, "enable_tower_connector_lora", False):
        # vLLM would warn once, in a worker, and then leave out what an adapter changes in the tower.
        raise ValueError(
            "plugin fsr: --enable-tower-connector-lora does not work together with the plugin, whose rows vLLM would "
            "take for the tower's; start without it (adapters of the language model work)"
        )
    reason = unsupported(model_config)
    if reason:
        if settings.prunes_by_default:
            raise ValueError(f"plugin fsr: a default budget is set, but {reason}")
        logger.warning("fsr_vllm: %s; requests are served unpruned, and requests with fsr fields are refused", reason)
        return
    encoder, sign = text_tower.find_encoder(model_config, settings.text_encoder, settings.relevance_sign)
    settings = settings.model_copy(update={"text_encoder": encoder, "relevance_sign": sign})
    overrides = {params.SETTINGS_KEY: settings.model_dump_json()}
    model_config.hf_config.update(overrides)
    model_config.hf_overrides = compat.with_overrides(model_config.hf_overrides, overrides)
    logger.info("fsr_vllm: active for %s with %s", family, settings.model_dump_json())


def unsupported(model_config: Any) -> str | None:
    """Why this model's images cannot be pruned, or None."""
    for architecture in model_config.architectures:
        if architecture in FAMILIES:
            family = importlib.import_module(FAMILIES[architecture].partition(":")[0])
            return family.unsupported(model_config.hf_config)
    names = ", ".join(model_config.architectures)
    return f"architecture {names} is not supported (supported: {', '.join(FAMILIES)})"
