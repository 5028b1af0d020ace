"""What a conversation says about its images' budgets and questions, on every surface that has
messages.

Settled where the messages are rendered, below HTTP: /v1/chat/completions, /v1/responses,
/v1/messages, /tokenize, pooling endpoints, run-batch and offline `LLM.chat` all come through here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fsr_vllm import adaptive
from fsr_vllm.compat.chat import wrap_chat_rendering
from fsr_vllm.compat.errors import request_error
from fsr_vllm.compat.front_end import image_limit
from fsr_vllm.compat.version import why_inactive
from fsr_vllm.engine.inputs import IGNORED_KEY
from fsr_vllm.params import (
    HOW_TO_ACTIVATE,
    MAX_IMAGES,
    MAX_QUESTION,
    PREFIX,
    SETTINGS_KEY,
    Budget,
    FieldError,
    RequestFields,
    ServerSettings,
    per_image,
    readable,
    resolve_budget,
)
from fsr_vllm.params.misplaced import in_messages, misspelt
from fsr_vllm.signals import instruction

DERIVED_KEY = PREFIX + "derived"  # of mm_processor_kwargs, beside the client's own fields


@dataclass(frozen=True)
class Derived:
    """What the conversation says of its images, one entry per image in prompt order; empty:
    nothing.

    It travels apart from what the client asked for, and is never judged, or named in an error, as
    if it were that. A client cannot send one: what comes as JSON under this key is an unknown
    field.
    """

    questions: tuple[str, ...] = ()
    budgets: tuple[Budget | None, ...] = ()  # what `image_url.detail` maps to; None: the default

    def of(self, count: int) -> Derived:
        """This, if it speaks of `count` images."""
        same = all(len(entries) in (0, count) for entries in (self.questions, self.budgets))
        return self if same else Derived()


def install(unsupported: Callable[[Any], str | None]) -> None:
    """Hook vLLM's chat rendering, once per process; `unsupported` is activation.unsupported."""

    def settle(model_config: Any, conversations: Any, given: Any) -> Any:
        try:
            return settled(model_config, conversations, given, unsupported)
        except FieldError as error:
            raise request_error(str(error), error.field) from None

    wrap_chat_rendering(settle)


def settled(
    model_config: Any,
    conversations: Sequence[Any],
    given: Mapping[str, Any] | None,
    unsupported: Callable[[Any], str | None],
) -> list[Any]:
    """mm_processor_kwargs of each conversation: `given` with what its images' questions and details
    are, or `given`.

    Detail counts only where no budget is given. Errors: FieldError for fields that this model, or
    this number of images, cannot have.
    """
    unchanged = [given] * len(conversations)
    if getattr(model_config.hf_config, IGNORED_KEY, False):
        return unchanged  # what is ours in it is dropped where all inputs pass
    fields = {k: v for k, v in (given or {}).items() if k.startswith(PREFIX) and v is not None}
    most = image_limit(model_config)
    wrong = misspelt(given) or next(
        filter(None, (in_messages(messages, most) for messages in conversations)), None
    )
    text = getattr(model_config.hf_config, SETTINGS_KEY, None)
    reason = unsupported(model_config) if text is not None else None
    if text is None or reason:
        if fields or wrong:
            reason = reason or why_inactive(HOW_TO_ACTIVATE)
            name = wrong.field if wrong else min(fields)
            raise FieldError(name, f"{name}: {reason}")
        return unchanged
    if wrong:
        raise wrong
    settings = ServerSettings.from_json(text)
    check_lengths(model_config, fields)
    # Once for all of them, and of text-only conversations too, where no processor would judge them.
    RequestFields.parse(fields, settings)
    if not fields and not settings.prunes_by_default:
        return unchanged
    return [_settle_one(settings, messages, given, fields, most) for messages in conversations]


def _settle_one(
    settings: ServerSettings, messages: Any, given: Any, fields: Mapping[str, Any], most: int
) -> Any:
    instruction.materialise(messages)
    count = instruction.count_images(messages, most)
    if count > most:
        return given  # vLLM refuses them; nothing is read for what is not served
    others = {k: v for k, v in (given or {}).items() if not k.startswith(PREFIX)}
    if not count:
        return others if fields else given  # text only: nothing to prune
    for name in (
        "fsr_budget",
        "fsr_question",
    ):  # said here, where the images are counted, rather than at the first one
        per_image(fields.get(name), count, name)
    questions: list[str] = []
    if "fsr_question" not in fields:
        # Of a long text the end is read: that is where people put their question.
        questions = instruction.image_questions(messages, MAX_QUESTION)
        legible = {question: readable(question) for question in set(questions)}
        questions = [legible[question] for question in questions]
    budgets = () if "fsr_budget" in fields else budgets_by_detail(settings, messages)
    return {**others, **fields, DERIVED_KEY: Derived(tuple(questions), budgets)}


def check_lengths(model_config: Any, fields: Mapping[str, Any]) -> None:
    """FieldError for a list with more entries than a prompt may hold images, before any entry is
    looked at.
    """
    most = image_limit(model_config) or MAX_IMAGES  # embeddings are let in beyond a limit of 0
    for name in ("fsr_budget", "fsr_question"):
        value = fields.get(name)
        if isinstance(value, (list, tuple)) and len(value) > most:
            raise FieldError(
                name, f"{name} has {len(value)} entries; a prompt may hold {most} images"
            )


def budgets_by_detail(settings: ServerSettings, messages: Any) -> tuple[Budget | None, ...]:
    """Per image: the budget its `image_url.detail` maps to; empty where no image's detail maps to
    one.

    Where only some do, the default of the others is left to the processor, which knows the load
    later and reports it.
    """
    if not settings.detail_budgets:
        return ()
    details = [detail or "auto" for detail in instruction.image_details(messages)]
    if settings.detail_budgets.keys().isdisjoint(details):
        return ()
    return tuple(settings.detail_budgets.get(detail) for detail in details)


def completed(
    settings: ServerSettings, fields: RequestFields, derived: Derived, totals: Sequence[int]
) -> tuple[RequestFields, int | None]:
    """The client's fields with what was derived, and the default budget, where it says nothing; and
    that default where it follows the load and was used.

    What the client did not ask for is brought within the server's range rather than refused.
    """
    derived = derived.of(len(totals))
    update: dict[str, Any] = {}
    if fields.fsr_question is None and derived.questions:
        update["fsr_question"] = list(derived.questions)
    by_load = None
    if fields.fsr_budget is None and totals:
        budgets = derived.budgets or (None,) * len(totals)
        by_load = adaptive.default_budget(settings.adaptive_range) if None in budgets else None
        default = by_load or settings.default_budget
        low, high = settings.min_budget or 1, settings.max_budget
        update["fsr_budget"] = [
            min(
                max(resolve_budget(default if budget is None else budget, total), low),
                high or total,
            )
            for budget, total in zip(budgets, totals, strict=True)
        ]
    return fields.model_copy(update=update), by_load
