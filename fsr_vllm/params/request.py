"""The fsr_* fields of one request: validated, and not yet resolved to an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from .budget import MAX_IMAGES, Asked, Budget, FieldError, Total, parse_budgets, readable
from .method import build_method, known_method
from .server import ServerSettings
from .validation import Fields

PREFIX = "fsr_"
# Characters of a question that are read: a text tower runs once per 75 tokens, inside the engine's
# step.
MAX_QUESTION = 4096
MAX_QUESTIONS = 64 * MAX_QUESTION  # of a list, all its entries together


def _known(value: str) -> str:
    return known_method(value, "fsr_method")


def _questions(value: str | list[str]) -> str | list[str]:
    lengths = [len(text) for text in ([value] if isinstance(value, str) else value)]
    wrong = None
    if max(lengths, default=0) > MAX_QUESTION:
        wrong = f"may have {MAX_QUESTION} characters; got {max(lengths)}"
    elif sum(lengths) > MAX_QUESTIONS:
        wrong = f"may have {MAX_QUESTIONS:,} characters in all; got {sum(lengths):,}"
    elif any(readable(text) != text for text in ([value] if isinstance(value, str) else value)):
        wrong = "must be valid Unicode; it holds half of a surrogate pair"
    if wrong:
        raise FieldError("fsr_question", f"fsr_question {wrong}")
    return value


class RequestFields(Fields):
    """The fsr_* fields of one request; null counts as absent."""

    unknown: ClassVar[str] = "unknown field {name}; fsr fields are {known}"
    must: ClassVar[Mapping[str, str]] = {
        "fsr_method": "be the name of a method",
        "fsr_question": "be text, or a list with one text per image",
        "fsr_options": "be an object of the method's options",
    }

    # Descriptions are part of the server's OpenAPI schema.
    fsr_budget: Annotated[Asked, BeforeValidator(parse_budgets)] | None = Field(
        default=None,
        description="Visual tokens kept per image: a number of tokens, a share between 0 and 1, "
        'or "off"; a list of these with one entry per image, in prompt order; or {"total": K} '
        "for all images of the request together.",
    )
    fsr_method: Annotated[str, AfterValidator(_known)] | None = Field(
        default=None, description="Which tokens are kept; GET /v1/fsr/config lists the methods."
    )
    fsr_question: Annotated[str | list[str], AfterValidator(_questions)] | None = Field(
        default=None,
        description="What the tokens are to answer, for all images or one text per image; "
        "without it, the text that comes with an image.",
    )
    fsr_options: dict[str, Any] | None = Field(
        default=None, description='The method\'s options, such as {"preset": "paper"}.'
    )

    @classmethod
    def parse(
        cls, values: Mapping[str, Any], settings: ServerSettings, images: int = 0
    ) -> RequestFields:
        """Validate fields against the registry and the server's bounds; FieldError for the first.

        `images`: how many a prompt may hold, where that is known.
        """
        _check_lengths(values, images)
        fields = cls.validated(values)
        for budget in fields.budgets() or []:
            settings.check_bounds(budget)
        build_method(fields.fsr_method or settings.method, fields.fsr_options)
        return fields

    def budgets(self) -> list[Budget] | None:
        """All budgets asked for image by image; None when the request has none."""
        if self.fsr_budget is None or isinstance(self.fsr_budget, Total):
            return None
        return self.fsr_budget if isinstance(self.fsr_budget, list) else [self.fsr_budget]


REQUEST_FIELDS = tuple(RequestFields.model_fields)


def _check_lengths(values: Mapping[str, Any], images: int) -> None:
    """Refuse a list longer than any prompt has images, before an entry is looked at."""
    most = images or MAX_IMAGES  # embeddings are let in beyond a limit of 0
    for name in ("fsr_budget", "fsr_question"):
        value = values.get(name)
        if isinstance(value, (list, tuple)) and len(value) > most:
            raise FieldError(
                name, f"{name} has {len(value)} entries; a prompt may hold {most} images"
            )
