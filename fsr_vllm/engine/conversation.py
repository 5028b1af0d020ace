"""What a conversation says about its images' budgets and questions, on every surface that has
messages.

Settled where the messages are rendered, below HTTP: /v1/chat/completions, /v1/responses,
/v1/messages, /tokenize, pooling endpoints, run-batch and offline `LLM.chat` all come through here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from fsr_vllm.compat.attributes import IGNORED_KEY
from fsr_vllm.compat.chat import wrap_chat_rendering
from fsr_vllm.compat.errors import as_request_errors
from fsr_vllm.compat.front_end import image_limit
from fsr_vllm.compat.types import ModelConfig
from fsr_vllm.engine import messages as read
from fsr_vllm.engine.inputs import requested
from fsr_vllm.params import (
    MAX_QUESTION,
    NOTHING,
    Budget,
    Derived,
    FieldError,
    FsrRequest,
    RequestFields,
    ServerSettings,
    per_image,
    read_settings,
    readable,
    refusal,
    request_of,
    with_request,
    without_fields,
)
from fsr_vllm.params.misplaced import in_messages

Given: TypeAlias = Mapping[str, object] | None  # mm_processor_kwargs
Conversation: TypeAlias = Iterable[object]  # chat messages, as a client or a user wrote them


def install() -> None:
    """Hook vLLM's chat rendering, once per process."""

    def settle(
        model_config: ModelConfig, conversations: Sequence[Conversation], given: Given
    ) -> list[Given]:
        with as_request_errors(FieldError):
            return settled(model_config, conversations, given)

    wrap_chat_rendering(settle)


def settled(
    model_config: ModelConfig, conversations: Sequence[Conversation], given: Given
) -> list[Given]:
    """mm_processor_kwargs of each conversation: `given` with what its images' questions and details
    are, or `given`.

    Detail counts only where no budget is given. Errors: FieldError for fields that this model, or
    this number of images, cannot have.
    """
    unchanged = [given] * len(conversations)
    if getattr(model_config.hf_config, IGNORED_KEY, False):
        return unchanged  # what is ours in it is dropped where all inputs pass
    most = image_limit(model_config)
    # Parsed once for all of them, and for conversations of text alone too, which no processor sees.
    request = requested(model_config, given)
    reason = refusal(model_config.hf_config)
    if request_of(given) is None:  # else a server parsed it, after it had searched the whole body
        wrong = next(filter(None, (in_messages(each, most) for each in conversations)), None)
        if wrong is not None:
            raise FieldError(wrong.field, f"{wrong.field}: {reason}") if reason else wrong
    settings = read_settings(model_config.hf_config)
    if settings is None or reason:
        return unchanged
    if request in (None, NOTHING) and not settings.prunes_by_default:
        return unchanged
    return [_settle_one(settings, messages, given, request, most) for messages in conversations]


def _settle_one(
    settings: ServerSettings,
    messages: Conversation,
    given: Given,
    request: FsrRequest | None,
    most: int,
) -> Given:
    read.materialise(messages)
    count = read.count_images(messages, most)
    if count > most:
        return given  # vLLM refuses them; nothing is read for what is not served
    if not count:  # text only: nothing to prune
        return given if request is None else without_fields(given)
    request = request or FsrRequest(RequestFields())
    fields = request.fields
    # Said here, where the images are counted, rather than at the first of them.
    per_image(fields.fsr_budget, count, "fsr_budget")
    per_image(fields.fsr_question, count, "fsr_question")
    questions: list[str] = []
    if fields.fsr_question is None:
        # Of a long text the end is read: that is where people put their question.
        questions = read.image_questions(messages, MAX_QUESTION)
        legible = {question: readable(question) for question in set(questions)}
        questions = [legible[question] for question in questions]
    budgets = budgets_by_detail(settings, messages) if fields.fsr_budget is None else ()
    derived = Derived(tuple(questions), budgets)
    return with_request(given, replace(request, derived=derived))


def budgets_by_detail(
    settings: ServerSettings, messages: Conversation
) -> tuple[Budget | None, ...]:
    """Per image: the budget its `image_url.detail` maps to; empty where no image's detail maps to
    one.

    Where only some do, the default of the others is left to the processor, which knows the load
    later and reports it.
    """
    if not settings.detail_budgets:
        return ()
    details = [detail or "auto" for detail in read.image_details(messages)]
    if settings.detail_budgets.keys().isdisjoint(details):
        return ()
    return tuple(settings.detail_budgets.get(detail) for detail in details)
