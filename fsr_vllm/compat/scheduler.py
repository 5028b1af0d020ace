"""The scheduler: an image costs a step what the vision tower spends on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from fsr_vllm.compat.identity import unpruned_tokens
from fsr_vllm.compat.patching import Patch, shadowed
from fsr_vllm.compat.state import IGNORING, state
from fsr_vllm.compat.types import (
    Anything,
    Feature,
    Function,
    Scheduler,
    SchedulerRequest,
    VllmConfig,
)

_UNTIL = "vLLM counts encoder work apart from embeddings"
_LINK = "https://github.com/vllm-project/vllm/pull/41239"
SCHEDULER_CLASS = Patch(
    "vllm.config.scheduler:SchedulerConfig.get_scheduler_cls",
    "The engine core makes its scheduler after plugins are loaded, and asks here for the class.",
    _UNTIL,
    signature="(self)",
    run="0.27, 0.28, 0.30-0.32",
    link=_LINK,
)
ENCODER_STEP = Patch(
    "vllm.v1.core.sched.scheduler:Scheduler._try_schedule_encoder_inputs",
    "The scheduler counts an image by its placeholders, so a budget of 1 lets hundreds of images "
    "into one step, and all other requests wait for the tower. Here an image counts as what it "
    "would without pruning, so that no step gives the tower more than an unpruned server's would. "
    "Relied on: the arguments, and the place of the budget in the result.",
    _UNTIL,
    signature="(self, request, num_computed_tokens, num_new_tokens, encoder_compute_budget)",
    run="0.27, 0.28, 0.30-0.32",
    missing="schedulers that encode in another step",
    link=_LINK,
)
CAN_ALLOCATE = Patch(
    "vllm.v1.core.encoder_cache_manager:EncoderCacheManager.can_allocate",
    "Stock asks it for every image before it charges the image's placeholders. Shadowed on the one "
    "object, whatever its class, for the length of one call.",
    _UNTIL,
    signature="(self, request, input_id, encoder_compute_budget, num_embeds_to_schedule)",
    run="0.27, 0.28, 0.30-0.32",
    link=_LINK,
)


def wrap_scheduler(limited: Callable[[VllmConfig], bool]) -> None:
    """Limit the tower's work of a step where limited(vllm_config) holds."""

    def make(stock: Function) -> Function:
        def get_scheduler_cls(self: Anything) -> type:
            cls = stock(self)
            if state() != IGNORING:
                limit(cls, limited)
            return cls

        return get_scheduler_cls

    SCHEDULER_CLASS.apply(make)


def limit(cls: type, limited: Callable[[VllmConfig], bool]) -> bool:
    """Wrap the step of the scheduler class, or of its base, that picks images; once."""

    def make(stock: Function) -> Function:
        def schedule_encoder_inputs(
            self: Scheduler,
            request: SchedulerRequest,
            computed: int,
            new: int,
            budget: int,
            *args: Anything,
            **kwargs: Anything,
        ) -> tuple[Anything, ...]:
            features = request.mm_features
            # A request that decodes has no image before it: this is all that most calls cost.
            if not features or computed >= _end(features[-1]) or not limited(self.vllm_config):
                return stock(self, request, computed, new, budget, *args, **kwargs)
            gate = EncoderGate(self, request, budget)
            if not self.scheduler_config.enable_chunked_prefill:
                return gate.whole_or_not_yet(
                    stock(self, request, computed, new, budget, *args, **kwargs), new
                )
            with gate.over(self.encoder_cache_manager):
                result = stock(self, request, computed, new, budget, *args, **kwargs)
            return gate.charged(result)

        return schedule_encoder_inputs

    owner = next((each for each in cls.__mro__ if ENCODER_STEP.name in vars(each)), cls)
    return ENCODER_STEP.apply(make, owner)


def _end(feature: Feature) -> int:
    return feature.mm_position.offset + feature.mm_position.length


class EncoderGate:
    """What one request may still give the tower in this step, counted in unpruned tokens.

    It stands before the encoder cache manager's `can_allocate`, which stock asks for every image
    before it charges the image's placeholders. An image costs max(K, min(N, step)): what is larger
    than a whole step's budget goes alone, as stock lets its largest item. Beyond its first image a
    pruned request takes at most half of what is left while other requests have images to encode, or
    one with hundreds of images would keep them all waiting.
    """

    def __init__(self, scheduler: Scheduler, request: SchedulerRequest, budget: int) -> None:
        """`budget` is what the step still has, in unpruned tokens."""
        self.scheduler, self.request, self.budget = scheduler, request, budget
        self.whole = scheduler.max_num_encoder_input_tokens
        self.spent = 0
        self._allowed: tuple[int, int] | None = (
            None  # what stock had left when it was last allowed an image, its cost
        )
        self._others: bool | None = None

    def cost(self, place: int) -> int:
        """Unpruned tokens of the request's image at `place`, never fewer than its placeholders."""
        kept = self.request.get_num_encoder_embeds(place)
        return max(kept, min(unpruned_tokens(self.request.mm_features[place]), self.whole))

    @contextlib.contextmanager
    def over(self, manager: Anything) -> Iterator[None]:
        """Shadow the method on this one object, whatever its class, for the length of one call."""
        stock = manager.can_allocate

        def can_allocate(request: SchedulerRequest, place: int, left: int, scheduled: int) -> bool:
            return self.admits(place, left) and self._note(
                stock(request, place, left, scheduled), place, left
            )

        with shadowed(manager, CAN_ALLOCATE.name, can_allocate):
            yield

    def admits(self, place: int, left: int) -> bool:
        """Whether the image fits beside what stock has charged by now; stock has `left` left."""
        # An image that was allowed but loaded from elsewhere was not charged, and costs the tower
        # nothing.
        if self._allowed is not None and left < self._allowed[0]:
            self.spent += self._allowed[1]
        self._allowed = None
        cost = self.cost(place)
        pruned = cost > self.request.get_num_encoder_embeds(place)
        if pruned and self.spent and self.spent + cost > self.budget // 2 and self.others_wait():
            return False
        return self.spent + cost <= self.budget

    def _note(self, allowed: bool, place: int, left: int) -> bool:
        self._allowed = (left, self.cost(place)) if allowed else None
        return allowed

    def whole_or_not_yet(self, result: tuple[Anything, ...], new: int) -> tuple[Anything, ...]:
        """Stock's result for a prompt that must not be split, or one that leaves it to a later
        step.

        Poolers such as MEAN need a prompt in one piece. So it is scheduled whole if its images fit
        beside what this step encodes already, or if it is the first with images: then, as in stock,
        its size is what the step costs.
        """
        cost = sum(map(self.cost, result[0]))
        if self.budget < self.whole and (cost > self.budget or result[1] < new):
            return ([], 0, self.budget, *([] for _ in result[3:]))
        return self.charged(result)

    def charged(self, result: tuple[Anything, ...]) -> tuple[Anything, ...]:
        """Stock's result with what these images leave of the step's budget, in unpruned tokens.

        The caller takes the third element for what is left, but only if it schedules the request:
        nothing to undo.
        """
        if not result[0]:
            return result
        return (*result[:2], max(0, self.budget - sum(map(self.cost, result[0]))), *result[3:])

    def others_wait(self) -> bool:
        """Whether another running request, or the first that waits, has images to encode."""
        if self._others is None:
            self._others = any(
                each is not self.request and _to_encode(each)
                for each in _contenders(self.scheduler)
            )
        return self._others


def _contenders(scheduler: Scheduler) -> Iterator[SchedulerRequest]:
    yield from scheduler.running
    if (
        scheduler.waiting
    ):  # its head: a prompt that begins with an image holds up all that waits behind it
        yield scheduler.waiting.peek_request()


def _to_encode(request: SchedulerRequest) -> bool:
    return bool(request.mm_features) and request.num_computed_tokens < _end(request.mm_features[-1])
