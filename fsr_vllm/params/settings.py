"""Where settings are read: as given at start, and as found in the model config afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .budget import FieldError
from .server import HOW_TO_ACTIVATE, SETTINGS_KEY, ServerSettings
from .wording import shown


def given_settings(additional_config: object, named: bool) -> dict[str, Any] | None:
    """The fsr settings of a server as given, unjudged; None while the plugin is not active.

    `named`: whether VLLM_PLUGINS names the plugin. Errors: FieldError where
    additional_config["fsr"] is no object.
    """
    if not isinstance(additional_config, Mapping) or "fsr" not in additional_config:
        return {} if named else None
    given = additional_config["fsr"]
    if given is not None and not isinstance(given, Mapping):
        hint = (
            '; to switch the plugin off, leave it out, or give {"ignore": true}'
            if given is False
            else ""
        )
        raise FieldError(
            "additional_config",
            'additional_config["fsr"] must be an object of options; '
            f"got {type(given).__name__}{hint}",
        )
    return dict(given or {})


def ignoring(given: Mapping[str, Any] | None) -> bool:
    """Whether these settings say that the plugin is to be left aside, whatever else they hold."""
    value = (given or {}).get("ignore", False)
    if not isinstance(value, bool):
        raise FieldError("fsr.ignore", f"fsr.ignore must be true or false; got {shown(value)}")
    return value


def read_settings(hf_config: object) -> ServerSettings | None:
    """The settings that start-up put into the model config; None while the plugin is inactive."""
    text = getattr(hf_config, SETTINGS_KEY, None)
    return None if text is None else ServerSettings.from_json(text)


def refusal(hf_config: object) -> str | None:
    """Why no request of this server can have fields of ours; None if it can."""
    settings = read_settings(hf_config)
    if settings is None:
        return f"plugin fsr is not active; {HOW_TO_ACTIVATE}"
    return settings.unsupported
