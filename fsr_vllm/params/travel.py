"""A request's fields on their way to planning: parsed once, and from then on one typed value.

`mm_processor_kwargs` is vLLM's only channel from a request to its processor. Whoever meets a
request first parses its fields and puts one `FsrRequest` there in their place; whoever finds one
does not parse again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .budget import Budget
from .misplaced import is_ours
from .request import PREFIX, RequestFields

REQUEST_KEY = PREFIX + "request"  # of mm_processor_kwargs


@dataclass(frozen=True)
class Derived:
    """What the conversation says of its images, one entry per image in prompt order; empty:
    nothing.

    It travels apart from what the client asked for, and is never judged, or named in an error, as
    if it were that.
    """

    questions: tuple[str, ...] = ()
    budgets: tuple[Budget | None, ...] = ()  # what `image_url.detail` maps to; None: the default

    def of(self, count: int) -> Derived:
        """This, if it speaks of `count` images."""
        same = all(len(entries) in (0, count) for entries in (self.questions, self.budgets))
        return self if same else Derived()


@dataclass(frozen=True)
class FsrRequest:
    """What one request asked for, validated, and what the plugin found in its conversation.

    A client cannot make one: a JSON value under `REQUEST_KEY` is an unknown field.
    """

    fields: RequestFields
    derived: Derived = Derived()


def request_of(values: Mapping[str, Any] | None) -> FsrRequest | None:
    """The request that was parsed already, if these mm_processor_kwargs hold one."""
    found = (values or {}).get(REQUEST_KEY)
    return found if isinstance(found, FsrRequest) else None


def own_fields(values: Any) -> dict[str, Any]:
    """The fields in our name space as a client wrote them; null counts as absent."""
    given = values if isinstance(values, Mapping) else {}
    return {
        key: value for key, value in given.items() if key.startswith(PREFIX) and value is not None
    }


def without_fields(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """The same without our fields, in whatever spelling."""
    return {key: value for key, value in (values or {}).items() if not is_ours(key)}


def with_request(values: Mapping[str, Any] | None, request: FsrRequest) -> dict[str, Any]:
    """mm_processor_kwargs with the parsed request in place of the fields as written."""
    return {**without_fields(values), REQUEST_KEY: request}
