"""Model names with a budget behind them: `NAME@fsr128`, `NAME@fsr0.25`, `NAME@fsroff`, for clients
that can set nothing but the model.

The suffix comes off before vLLM checks the name, so that an unknown model or adapter is vLLM's
usual 404. A name that is served as it stands, suffix and all, keeps its own meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from fsr_vllm.params import SETTINGS_KEY, Budget, FieldError, ServerSettings, parse_budget_text

MARK = "@fsr"

# Of the task that serves one request: endpoints check the model and render in the same one.
_current: ContextVar[Budget | None] = ContextVar("fsr_alias", default=None)


def budget() -> Budget | None:
    """The budget behind the current request's model name, if any."""
    return _current.get()


def split(model_config: Any, request: Any) -> str | None:
    """Take the suffix off `request.model` and return it; None if names are served as they are."""
    text = getattr(model_config.hf_config, SETTINGS_KEY, None)
    name = request.model
    if text is None or not isinstance(name, str) or not ServerSettings.from_json(text).model_alias:
        return None
    base, mark, suffix = name.rpartition(MARK)
    if not mark or not base:
        return None
    request.model = base
    return suffix


def accept(model_config: Any, suffix: str | None, unsupported: Callable[[Any], str | None]) -> None:
    """Make the suffix the current request's budget; FieldError if it is none, or this model cannot
    have one.
    """
    _current.set(None)
    if suffix is None:
        return
    reason = unsupported(model_config)
    if reason:
        raise FieldError(
            "model", f"model: the name asks for a budget ({MARK}{suffix[:20]}), but {reason}"
        )
    settings = ServerSettings.from_json(getattr(model_config.hf_config, SETTINGS_KEY))
    where = f"model: the budget behind {MARK}"
    try:
        value = parse_budget_text(suffix, where)
        if isinstance(value, list):
            raise FieldError(
                "model", f"model: one budget stands behind {MARK}; lists go into fsr_budget"
            )
        settings.check_bounds(value, where, settings.tokens_per_image)
    except FieldError as error:
        raise FieldError("model", str(error)) from None
    _current.set(value)
