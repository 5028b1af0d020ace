"""What a request or a server may ask: validation, defaults, resolution to integers.

Nothing here knows HTTP or vLLM. Errors are `FieldError`, which names the field and says what is
allowed; the caller turns it into the error of its own surface.
"""

from fsr_vllm.methods.budget import resolve_budget

from .budget import (
    MAX_IMAGES,
    Asked,
    Budget,
    FieldError,
    Total,
    parse_budget_text,
    per_image,
    readable,
    same_budget,
)
from .method import build_method, served_methods
from .plan import SELECTION_VERSION, ImagePlan, resolve
from .request import (
    MAX_QUESTION,
    REQUEST_FIELDS,
    RequestFields,
)
from .server import HOW_TO_ACTIVATE, SETTINGS_KEY, ServerSettings
from .settings import given_settings, ignoring, read_settings, refusal
from .travel import (
    NOTHING,
    REQUEST_KEY,
    Derived,
    FsrRequest,
    Report,
    own_fields,
    request_of,
    with_request,
    without_fields,
)
from .wording import cut, did_you_mean, shown

__all__ = [
    "Asked", "Budget", "Derived", "FieldError", "FsrRequest", "HOW_TO_ACTIVATE", "ImagePlan",
    "MAX_IMAGES", "MAX_QUESTION", "NOTHING", "REQUEST_FIELDS", "REQUEST_KEY", "Report",
    "RequestFields", "SELECTION_VERSION", "SETTINGS_KEY", "ServerSettings", "Total",
    "build_method", "cut", "did_you_mean", "given_settings", "ignoring", "own_fields",
    "parse_budget_text", "per_image", "read_settings", "readable", "refusal", "request_of",
    "resolve", "resolve_budget", "same_budget", "served_methods", "shown", "with_request",
    "without_fields",
]  # fmt: skip
