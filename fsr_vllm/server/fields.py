"""Where one HTTP request says its fields, and whether the places agree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fsr_vllm.params import (
    MAX_IMAGES,
    Asked,
    FieldError,
    ServerSettings,
    Total,
    own_fields,
    parse_budget_text,
    same_budget,
    shown,
)

BUDGET_HEADER = "x-fsr-budget"


def written(top: object, processor_kwargs: object, xargs: object) -> dict[str, Any]:
    """The fsr_* values of a body: at its top level and in vLLM's two carriers; null is absent.

    Errors: FieldError when the same field stands in two places with different values.
    """
    return merged(own_fields(top), own_fields(processor_kwargs), _from_xargs(xargs))


def merged(*places: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of all places; FieldError where two differ, as 1 and true do."""
    found: dict[str, Any] = {}
    for place in places:
        for name, value in place.items():
            if not _agree(name, found.setdefault(name, value), value):
                raise FieldError(
                    name, f"{name} stands in two places of the request with different values"
                )
    return found


def _agree(name: str, left: object, right: object) -> bool:
    """Whether a field is the same in two places."""
    if isinstance(left, list) and isinstance(right, list) and len(left) > MAX_IMAGES:
        return len(left) == len(right)  # refused by its length, its entries unread
    try:
        return (same_budget if name == "fsr_budget" else _same)(left, right)
    except RecursionError:  # no field is nested as deep as that
        return False


def _same(left: object, right: object) -> bool:
    """Whether two JSON values are one: 1 and 1.0 are, 1 and true are not."""
    if left is right:
        return True
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return isinstance(left, bool) is isinstance(right, bool) and left == right


def _from_xargs(values: object) -> dict[str, Any]:
    """Fields in vLLM's own carrier of extra arguments, where objects are JSON text."""
    fields = own_fields(values)
    budget = fields.get("fsr_budget")
    if isinstance(budget, str) and budget.lstrip().startswith("{"):
        fields["fsr_budget"] = parse_budget_text(budget, "fsr_budget")
    if isinstance(fields.get("fsr_options"), str):
        try:
            fields["fsr_options"] = json.loads(fields["fsr_options"])
        except (ValueError, RecursionError):
            raise FieldError(
                "fsr_options", "fsr_options in vllm_xargs must be a JSON object, as text"
            ) from None
    return fields


def with_header(values: dict[str, Any], header: str, settings: ServerSettings) -> dict[str, Any]:
    """The body's fields with the header's budget; FieldError where the two differ.

    A budget of the header alone is judged under the header's name, one of both under the body's.
    """
    budget = header_budget(header)
    if "fsr_budget" not in values and not isinstance(budget, Total):
        for one in budget if isinstance(budget, list) else [budget]:
            settings.check_bounds(one, BUDGET_HEADER, settings.every_total)
    stated = values.get("fsr_budget", budget)
    if not same_budget(stated, budget):
        raise FieldError(
            "fsr_budget",
            f"fsr_budget {shown(stated)} in the body differs from {shown(budget)} "
            f"in {BUDGET_HEADER}",
        )
    return {**values, "fsr_budget": budget}


def header_budget(text: str) -> Asked:
    """The budget of one or several header lines, which HTTP joins by commas, if all agree."""
    one, *others = dict.fromkeys(_lines(text))
    budget = parse_budget_text(one, BUDGET_HEADER)
    for other in others:
        if not same_budget(parse_budget_text(other, BUDGET_HEADER), budget):
            raise FieldError(
                BUDGET_HEADER, f"{BUDGET_HEADER} is there more than once, with different budgets"
            )
    return budget


def _lines(text: str) -> list[str]:
    """Header values apart: at the commas that stand outside of a list or an object."""
    depth = 0
    lines: list[list[str]] = [[]]
    for piece in text.split(","):
        if depth <= 0 and lines[-1]:
            lines.append([])
        lines[-1].append(piece)
        depth += sum(piece.count(mark) for mark in "[{") - sum(piece.count(mark) for mark in "]}")
    return [",".join(line).strip() for line in lines]
