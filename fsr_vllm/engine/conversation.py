"""What a conversation says about its images' budgets and questions, on every surface that has messages.

Settled where the messages are rendered, below HTTP: /v1/chat/completions, /v1/responses, /v1/messages, /tokenize,
pooling endpoints, run-batch and offline `LLM.chat` all come through here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fsr_vllm import adaptive, compat, compat_surfaces, compat_version
from fsr_vllm.engine.inputs import IGNORED_KEY
from fsr_vllm.params import (
    HOW_TO_ACTIVATE,
    MAX_QUESTION,
    PREFIX,
    SETTINGS_KEY,
    DetailBudgets,
    FieldError,
    RequestFields,
    ServerSettings,
    per_image,
    readable,
)
from fsr_vllm.params.misplaced import in_messages, misspelt
from fsr_vllm.signals import instruction


def install(unsupported: Callable[[Any], str | None]) -> None:
    """Hook vLLM's chat rendering and offline outputs, once per process; `unsupported` is plugin.unsupported."""

    def settle(model_config: Any, messages: Any, given: Any) -> Any:
        try:
            return settled(model_config, messages, given, unsupported)
        except FieldError as error:
            raise compat.request_error(str(error), error.field) from None

    compat_surfaces.wrap_chat_rendering(settle)
    compat_surfaces.wrap_outputs()


def settled(
    model_config: Any, messages: Any, given: Mapping[str, Any] | None, unsupported: Callable[[Any], str | None]
) -> Any:
    """mm_processor_kwargs of one conversation: `given` with each image's question and detail budget, or `given` itself.

    The question of an image is the user's text from its message up to the next assistant message. Detail counts only
    where no budget is given. Errors: FieldError for fields that this model, or this number of images, cannot have.
    """
    if getattr(model_config.hf_config, IGNORED_KEY, False):
        return given  # what is ours in it is dropped where all inputs pass
    fields = {k: v for k, v in (given or {}).items() if k.startswith(PREFIX) and v is not None}
    wrong = misspelt(given) or in_messages(messages, compat_surfaces.image_limit(model_config))
    text = getattr(model_config.hf_config, SETTINGS_KEY, None)
    reason = unsupported(model_config) if text is not None else None
    if text is None or reason:
        if fields or wrong:
            reason = reason or compat_version.why_inactive(HOW_TO_ACTIVATE)
            name = wrong.field if wrong else min(fields)
            raise FieldError(name, f"{name}: {reason}")
        return given
    if wrong:
        raise wrong
    settings = ServerSettings.from_json(text)
    RequestFields.parse(fields, settings)  # of a text-only conversation too, where no processor would judge them
    if not fields and not settings.prunes_by_default:
        return given
    instruction.materialise(messages)
    questions = instruction.image_questions(messages)
    others = {k: v for k, v in (given or {}).items() if not k.startswith(PREFIX)}
    if not questions:
        return others if fields else given  # text only: nothing to prune
    if "fsr_budget" not in fields and (by_detail := budgets_by_detail(settings, messages)):
        fields["fsr_budget"] = by_detail
    for name in ("fsr_budget", "fsr_question"):  # said here, where the images are counted, rather than at the first one
        per_image(fields.get(name), len(questions), name)
    # Of a long text the end is read: that is where people put their question.
    fields.setdefault("fsr_question", [readable(question[-MAX_QUESTION:]) for question in questions])
    return {**others, **fields}


def budgets_by_detail(settings: ServerSettings, messages: Any) -> DetailBudgets | None:
    """Per image: the budget its `image_url.detail` maps to; None where no image's detail maps to one.

    Where only some do, the default of the others is left to the processor, which knows the load later and reports it.
    """
    details = [detail or "auto" for detail in instruction.image_details(messages)]
    if settings.detail_budgets.keys().isdisjoint(details):
        return None
    return DetailBudgets(settings.detail_budgets.get(detail) for detail in details)


def with_default(settings: ServerSettings, values: Mapping[str, Any]) -> tuple[Mapping[str, Any], int | None]:
    """The fields with the default budget for images that neither the request nor their detail gives one, and that
    default where it follows the load and was used."""
    asked = values.get("fsr_budget")
    needed = asked is None or (isinstance(asked, DetailBudgets) and None in asked)
    by_load = adaptive.default_budget(settings.adaptive_range) if needed else None
    if isinstance(asked, DetailBudgets):
        return {**values, "fsr_budget": asked.filled(by_load or settings.default_budget)}, by_load
    return values if by_load is None else {**values, "fsr_budget": by_load}, by_load
