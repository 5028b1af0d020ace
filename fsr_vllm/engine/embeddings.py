"""Images that come as precomputed embeddings: never pruned, whatever the server's default is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fsr_vllm.params import FieldError, ImagePlan, RequestFields, ServerSettings, per_image

EMBEDDINGS = "image_embeds"  # the part of a message that carries them


def plan_embeddings(
    values: Mapping[str, Any], settings: ServerSettings, rows: Sequence[int | None]
) -> list[ImagePlan]:
    """A plan that keeps all rows of each image; `rows` are None where these items do not say how
    many they have.

    Errors: FieldError where the request asks for a budget, or an image has more rows than the
    server's maximum, which is what vLLM planned its memory with.
    """
    fields = RequestFields.parse(values, settings)
    budgets = per_image(fields.fsr_budget, len(rows), "fsr_budget")
    per_image(fields.fsr_question, len(rows), "fsr_question")
    if any(budget not in (None, "off") for budget in budgets):
        raise FieldError(
            "fsr_budget",
            f'fsr_budget: {EMBEDDINGS} cannot be pruned; leave the budget out, or "off" for these images',
        )
    if settings.max_budget is not None and None in rows:
        raise FieldError(
            EMBEDDINGS,
            f"{EMBEDDINGS}: this model's do not tell their rows, and this server has a maximum of "
            f"{settings.max_budget} visual tokens per image",
        )
    counts = [row or 0 for row in rows]
    largest = max(counts, default=0)
    if settings.max_budget is not None and largest > settings.max_budget:
        raise FieldError(
            EMBEDDINGS,
            f"{EMBEDDINGS}: {largest} rows of an image exceed this server's maximum of {settings.max_budget} visual "
            "tokens per image, and they cannot be pruned",
        )
    return [ImagePlan(count, count) for count in counts]
