"""Images that come as precomputed embeddings: never pruned, whatever the server's default is."""

from __future__ import annotations

from collections.abc import Sequence

from fsr_vllm.params import FieldError, ImagePlan, RequestFields, ServerSettings, per_image

EMBEDDINGS = "image_embeds"  # the part of a message that carries them


def plan_embeddings(
    fields: RequestFields, settings: ServerSettings, rows: Sequence[int | None]
) -> list[ImagePlan]:
    """A plan that keeps all rows of each image; `rows` are None where these items do not say how
    many they have.

    Errors: FieldError where the request asks for a budget, or an image has more rows than the
    server's maximum, with which vLLM planned its memory.
    """
    budgets = per_image(fields.fsr_budget, len(rows), "fsr_budget")
    per_image(fields.fsr_question, len(rows), "fsr_question")
    if any(budget not in (None, "off") for budget in budgets):
        raise FieldError(
            "fsr_budget",
            f"fsr_budget: {EMBEDDINGS} cannot be pruned; leave the budget out, "
            'or "off" for these images',
        )
    most = settings.max_budget
    if most is not None and None in rows:
        raise FieldError(
            EMBEDDINGS,
            f"{EMBEDDINGS}: this model's do not tell their rows, and this server has a maximum of "
            f"{most} visual tokens per image",
        )
    counts = [row or 0 for row in rows]
    if most is not None and max(counts, default=0) > most:
        raise FieldError(
            EMBEDDINGS,
            f"{EMBEDDINGS}: {max(counts)} rows of an image exceed this server's maximum of {most} "
            "visual tokens per image, and they cannot be pruned",
        )
    return [ImagePlan(count, count) for count in counts]
