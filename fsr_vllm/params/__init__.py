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
from .request import (
    MAX_QUESTION,
    MAX_QUESTIONS,
    PREFIX,
    REQUEST_FIELDS,
    RequestFields,
    check_lengths,
)
from .server import (
    HOW_TO_ACTIVATE,
    SETTINGS_KEY,
    ServerSettings,
    given_settings,
    ignoring,
    read_settings,
    refusal,
)
from .travel import (
    REQUEST_KEY,
    Derived,
    FsrRequest,
    own_fields,
    request_of,
    with_request,
    without_fields,
)
from .wording import cut, did_you_mean, shown

__all__ = [
    "HOW_TO_ACTIVATE", "MAX_BUDGET", "MAX_IMAGES", "MAX_QUESTION", "MAX_QUESTIONS", "PREFIX",
    "REQUEST_FIELDS", "REQUEST_KEY", "SELECTION_VERSION", "SERVED_DEFAULTS", "SETTINGS_KEY",
    "Budget", "Derived", "FieldError", "FsrRequest", "ImagePlan", "RequestFields",
    "ServerSettings", "build_method", "check_lengths", "cut", "did_you_mean", "given_settings",
    "ignoring", "own_fields", "parse_budget", "parse_budget_text", "parse_budgets", "parse_range",
    "per_image", "read_settings", "readable", "refusal", "request_of", "resolve",
    "resolve_budget", "same_budget", "served_methods", "shown", "with_request", "without_fields",
]  # fmt: skip
