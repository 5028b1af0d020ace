"""Model names with a budget behind them: `NAME@fsr128`, `NAME@fsr0.25`, `NAME@fsroff`,
`NAME@fsr{"total":640}`.

They are for clients that can set nothing but the model. The suffix comes off before vLLM checks
the name, so that an unknown model or adapter is vLLM's usual 404. A name that is served as it
stands, suffix and all, keeps its own meaning.
"""

from __future__ import annotations

from fsr_vllm.compat.types import HttpRequest, ModelConfig
from fsr_vllm.params import Budget, FieldError, Total, parse_budget_text, read_settings, refusal

MARK = "@fsr"


def split(request: HttpRequest) -> str | None:
    """Take the suffix off `request.model` and return it; None if there is none."""
    name = request.model
    base, mark, suffix = name.rpartition(MARK) if isinstance(name, str) else ("", "", "")
    if not mark or not base:
        return None
    request.model = base
    return str(suffix)


def split_if_served(model_config: ModelConfig, request: HttpRequest) -> str | None:
    """`split`, where this server serves names with budgets."""
    settings = read_settings(model_config.hf_config)
    return split(request) if settings is not None and settings.model_alias else None


def budget(model_config: ModelConfig, suffix: str) -> Budget | Total:
    """The budget behind a name; FieldError if it is none, or this server cannot give it."""
    reason, settings = refusal(model_config.hf_config), read_settings(model_config.hf_config)
    if reason or settings is None:
        raise FieldError(
            "model", f"model: the name asks for a budget ({MARK}{suffix[:20]}), but {reason}"
        )
    where = f"model: the budget behind {MARK}"
    try:
        value = parse_budget_text(suffix, where)
        if isinstance(value, list):
            raise FieldError(
                "model", f"model: one budget stands behind {MARK}; lists go into fsr_budget"
            )
        if not isinstance(value, Total):
            settings.check_bounds(value, where, settings.every_total)
    except FieldError as error:
        raise FieldError("model", str(error)) from None
    return value
