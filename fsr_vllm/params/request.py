"""The fsr_* fields of one request: validation, not yet resolved to an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from .budget import MAX_IMAGES, Budget, FieldError, field_error, parse_budgets, readable
from .method import build_method, known_method
from .server import ServerSettings
from .wording import cut, did_you_mean

PREFIX = "fsr_"
# Characters of a question that are read: a text tower runs once per 75 tokens, inside the engine's
# step.
MAX_QUESTION = 4096
MAX_QUESTIONS = 64 * MAX_QUESTION  # of a list, all its entries together
REQUEST_FIELDS = ("fsr_budget", "fsr_method", "fsr_question", "fsr_options")


class RequestFields(BaseModel):
    """The fsr_* fields of one request, validated but not yet resolved to an image."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    fsr_budget: Any = None
    fsr_method: str | None = None
    fsr_question: str | list[str] | None = None
    fsr_options: dict[str, Any] | None = None

    @classmethod
    def parse(
        cls, values: Mapping[str, Any], settings: ServerSettings, images: int = 0
    ) -> RequestFields:
        """Validate fields against the registry and the server's bounds; null means absent;
        FieldError otherwise.

        `images`: how many a prompt may hold, where known (see `check_lengths`).
        """
        check_lengths(values, images)
        unknown = sorted(set(values) - set(REQUEST_FIELDS))
        if unknown:
            name = cut(unknown[0])
            near = did_you_mean(name, REQUEST_FIELDS)
            raise FieldError(
                name, f"unknown field {name!r}; fsr fields are {', '.join(REQUEST_FIELDS)}{near}"
            )
        for name, kind, text in (
            ("fsr_method", str, "the name of a method"),
            ("fsr_options", dict, "an object of the method's options"),
        ):
            if values.get(name) is not None and not isinstance(values[name], kind):
                raise FieldError(name, f"{name} must be {text}; got {type(values[name]).__name__}")
        question = values.get("fsr_question")
        texts: list[Any] = question if isinstance(question, list) else [question]
        if len(texts) > MAX_IMAGES:
            raise FieldError(
                "fsr_question", f"fsr_question may have {MAX_IMAGES} entries; got {len(texts)}"
            )
        if question is not None and not all(isinstance(text, str) for text in texts):
            raise FieldError(
                "fsr_question", "fsr_question must be text, or a list with one text per image"
            )
        lengths = [len(text) for text in texts if text]
        if max(lengths, default=0) > MAX_QUESTION:
            raise FieldError(
                "fsr_question",
                f"fsr_question may have {MAX_QUESTION} characters; got {max(lengths)}",
            )
        if sum(lengths) > MAX_QUESTIONS:
            raise FieldError(
                "fsr_question",
                f"fsr_question may have {MAX_QUESTIONS:,} characters in all; got {sum(lengths):,}",
            )
        if any(text and readable(text) != text for text in texts):
            raise FieldError(
                "fsr_question",
                "fsr_question must be valid Unicode; it holds half of a surrogate pair",
            )
        try:
            fields = cls(**values)
        except ValidationError as error:
            raise field_error(error, "") from None
        for budget in fields.budgets() or []:
            settings.check_bounds(budget)
        build_method(fields.fsr_method or settings.method, fields.fsr_options)
        return fields

    @field_validator("fsr_budget", mode="before")
    @classmethod
    def _check_budget(cls, value: Any) -> Any:
        return None if value is None else parse_budgets(value)

    @field_validator("fsr_method")
    @classmethod
    def _check_method(cls, value: str | None) -> str | None:
        return None if value is None else known_method(value, "fsr_method")

    def budgets(self) -> list[Budget] | None:
        """All budgets asked for, as a list; None when the request has none."""
        if self.fsr_budget is None:
            return None
        return self.fsr_budget if isinstance(self.fsr_budget, list) else [self.fsr_budget]


def check_lengths(values: Mapping[str, Any], images: int) -> None:
    """FieldError for a list with more entries than a prompt may hold images, before any entry is
    looked at.
    """
    most = images or MAX_IMAGES  # embeddings are let in beyond a limit of 0
    for name in ("fsr_budget", "fsr_question"):
        value = values.get(name)
        if isinstance(value, (list, tuple)) and len(value) > most:
            raise FieldError(
                name, f"{name} has {len(value)} entries; a prompt may hold {most} images"
            )
