"""What a request or a server may ask: validation, defaults, and the resolution to integers before
any hash.

Nothing here knows HTTP or vLLM. Errors are `FieldError`, which names the field and says what is
allowed; the caller turns it into the error of its own surface.
"""

from .budget import (
    MAX_BUDGET,
    MAX_IMAGES,
    Budget,
    FieldError,
    parse_budget,
    parse_budget_text,
    parse_budgets,
    parse_range,
    per_image,
    readable,
    resolve_budget,
    same_budget,
)
from .method import SERVED_DEFAULTS, build_method, served_methods
from .plan import SELECTION_VERSION, ImagePlan, resolve
from .request import MAX_QUESTION, MAX_QUESTIONS, PREFIX, REQUEST_FIELDS, RequestFields
from .server import HOW_TO_ACTIVATE, SETTINGS_KEY, ServerSettings, given_settings, ignoring
from .wording import cut, did_you_mean, shown

__all__ = [
    "HOW_TO_ACTIVATE", "MAX_BUDGET", "MAX_IMAGES", "MAX_QUESTION", "MAX_QUESTIONS", "PREFIX", "REQUEST_FIELDS",
    "SELECTION_VERSION", "SERVED_DEFAULTS", "SETTINGS_KEY", "Budget", "FieldError", "ImagePlan", "RequestFields",
    "ServerSettings", "build_method", "cut", "did_you_mean", "given_settings", "ignoring", "parse_budget",
    "parse_budget_text", "parse_budgets", "parse_range", "per_image", "readable", "resolve", "resolve_budget",
    "same_budget", "served_methods", "shown",
]  # fmt: skip
