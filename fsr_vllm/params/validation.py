"""What requests and servers share: values that pydantic judges, refused in words of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from .budget import FieldError
from .wording import cut, did_you_mean, shown


class Fields(BaseModel):
    """Named values that stay as they are once validated.

    Pydantic's types judge them, and `must` says in words what a value has to be or do. A validator
    that can say more raises a FieldError itself.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prefix: ClassVar[str] = ""  # before the names in messages
    unknown: ClassVar[str] = "unknown field {name}; known: {known}"
    must: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def options(cls) -> list[str]:
        """The names that may be given."""
        return list(cls.model_fields)

    @classmethod
    def validated(cls, values: Mapping[str, Any]) -> Self:
        """The values, if all are known and valid; FieldError for the first that is not."""
        known = cls.options()
        wrong = min(set(map(str, values)) - set(known), default=None)
        if wrong is not None:
            name = cut(wrong)
            message = cls.unknown.format(name=repr(name), known=", ".join(known))
            raise FieldError(cls.prefix + name, message + did_you_mean(name, known))
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, FieldError):
            raise cause
        name = str(first["loc"][0])
        said = f"{cls.prefix}{name} must {cls.must[name]}; got {shown(values[name])}"
        raise FieldError(cls.prefix + name, said)
