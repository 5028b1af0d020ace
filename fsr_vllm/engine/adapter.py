"""Mixin for vLLM model classes: tower features -> signals -> method -> exactly K rows per image."""

from __future__ import annotations

import functools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fsr_vllm.compat.model import tokenizer_of, weight_source
from fsr_vllm.compat.parallel import broadcast_from_first, has_vision_tower, tensor_parallel_size
from fsr_vllm.compat.resets import on_runner_reset
from fsr_vllm.engine.caches import FeatureCache, unpack_plan
from fsr_vllm.engine.encoder_source import split_revision
from fsr_vllm.engine.planning import prototype_file, read_settings
from fsr_vllm.engine.processor import PLAN_FIELD
from fsr_vllm.engine.tap import SHALLOW, AttentionTap, Clock, shallow_key, shallow_keys, tapped
from fsr_vllm.engine.text_tower import WEIGHTS, ClipText, LlmText
from fsr_vllm.methods import VisualTokens, get_method, list_methods
from fsr_vllm.methods.prototypes import load_prototypes
from fsr_vllm.params import ImagePlan


@functools.lru_cache(maxsize=256)
def _method(name: str, options: str) -> Any:
    return get_method(name, **json.loads(options))


class FsrModelMixin:
    """Before a stock vLLM model class; inactive, it passes every call through."""

    # Declared, not assigned: a class attribute would hide the submodule of the same name.
    fsr_text: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        self.fsr_active = read_settings(config) is not None and self.fsr_unsupported(config) is None
        if not self.fsr_active:
            self.fsr_text = None
            return
        settings = read_settings(config)
        assert settings is not None
        # vLLM counts an image by its rows when it maps LoRA onto tower tokens, and ours are fewer
        # than the tower's.
        self.supports_tower_connector_lora = False
        shallow = frozenset().union(*map(shallow_keys, list_methods().values()))
        self.fsr_tap = AttentionTap(*self.fsr_attention(), shallow)
        self.fsr_clock = Clock()
        self.fsr_counts: dict[str, Any] = defaultdict(int)
        # The scheduler packs images by the rows they leave. The tower must not be handed more at
        # once than it would get unpruned: that is what memory was profiled for.
        self._fsr_tokens_at_once = vllm_config.scheduler_config.max_num_batched_tokens
        capacity = settings.feature_cache_bytes if has_vision_tower() else 0
        self.fsr_cache = FeatureCache(capacity) if capacity else None
        on_runner_reset(self)
        tokenizer = functools.partial(tokenizer_of, vllm_config.model_config)
        self._fsr_words = LlmText(self.language_model, tokenizer, settings.relevance_sign)  # type: ignore[attr-defined]
        self.fsr_text = self._fsr_text_side(
            settings, vllm_config.load_config.load_format == "dummy"
        )
        codebook = prototype_file(vllm_config.model_config.model)
        self._fsr_prototypes = load_prototypes(codebook) if codebook else None
        width = config.text_config.hidden_size
        if self._fsr_prototypes is not None and self._fsr_prototypes.shape[1] != width:
            raise ValueError(
                f"{codebook} holds rows of {self._fsr_prototypes.shape[1]} values, this model's have {width}"
            )

    def _fsr_text_side(self, settings: Any, dummy: bool) -> Any:
        if settings.text_encoder == "none":
            return None
        if settings.text_encoder == "llm":
            return self._fsr_words
        self.secondary_weights = [weight_source(*split_revision(settings.text_encoder), WEIGHTS)]
        return ClipText(settings.text_encoder, settings.relevance_sign, dummy)

    # What a family provides
    # ---------------------------------------------------------------------------------------

    @staticmethod
    def fsr_unsupported(hf_config: Any) -> str | None:
        """Why this checkpoint's images cannot be pruned, or None."""
        raise NotImplementedError

    def fsr_attention(self) -> tuple[Sequence[torch.nn.Module], int]:
        """The attention ops of the tower's computed blocks, in order, and how many blocks the whole
        tower has.
        """
        raise NotImplementedError

    def fsr_tower(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the tower gives for each image, (B, ...): all that is kept of it besides tapped
        signals.
        """
        raise NotImplementedError

    def fsr_project(self, tower: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tower features (B, N, Dv), and the same projected as the stock model does it (B, N, D)."""
        raise NotImplementedError

    def fsr_cls_row(self, tower: torch.Tensor) -> torch.Tensor:
        """The projected [CLS] row, (B, D)."""
        raise NotImplementedError

    # vLLM's calls
    # ---------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        if self.fsr_active:
            self.fsr_forget()
        if not isinstance(self.fsr_text, ClipText):
            return super().load_weights(weights)  # type: ignore[misc]
        ours: set[str | None] = set()

        def stock() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name.startswith(WEIGHTS):
                    # Copied at once: some loaders reuse their buffers after the next tensor.
                    ours.add(self.fsr_text.take(name.removeprefix(WEIGHTS), tensor))
                else:
                    yield name, tensor

        loaded = super().load_weights(stock())  # type: ignore[misc]
        self.fsr_text.check_loaded({name for name in ours if name})
        return loaded | {WEIGHTS + name for name, _ in self.fsr_text.named_parameters()}

    def embed_multimodal(self, **kwargs: Any) -> Any:
        packed = kwargs.pop(PLAN_FIELD, None)
        known = [unpack_plan(plan) for plan in packed] if packed is not None else []
        keys, plans = [key for key, _ in known], [plan for _, plan in known]
        if not any(plan.pruned for plan in plans) and not (
            self.fsr_active and self.fsr_cache and any(keys)
        ):
            if self.fsr_active:
                self.fsr_counts["tower_images"] += len(plans)
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        pixel_values = kwargs["pixel_values"]
        step = max(1, self._fsr_tokens_at_once // max(plan.total for plan in plans))
        rows: list[torch.Tensor] = []
        for start in range(0, len(plans), step):
            part = slice(start, start + step)
            rows += self._fsr_embed(pixel_values[part], keys[part], plans[part])
        return rows

    def fsr_forget(self) -> None:
        """Drop all that was computed with the weights so far."""
        self._fsr_words.clear()
        if isinstance(self.fsr_text, ClipText):
            self.fsr_text.clear()
        if self.fsr_cache is not None:
            self.fsr_cache.clear()

    # Vision tower
    # ---------------------------------------------------------------------------------------------------

    def _fsr_encode(
        self, pixel_values: torch.Tensor, keys: Sequence[bytes | None], wanted: frozenset[str]
    ) -> dict[str, torch.Tensor]:
        """The tower's output and the wanted signals of distinct images, from the cache where it has
        them all.
        """
        cache = self.fsr_cache
        found = [
            cache.get(key, {"tower", *wanted}) if cache is not None and key else None
            for key in keys
        ]
        missing = [place for place, entry in enumerate(found) if entry is None]
        fresh: dict[str, torch.Tensor] = {}
        if missing:
            self.fsr_tap.wanted = wanted
            if cache is not None:
                # What was held of an image stays held, or two methods would displace each other's
                # signals in turn.
                held = frozenset().union(*(cache.names(keys[place]) for place in missing))
                self.fsr_tap.wanted = tapped(wanted | held) | self.fsr_tap.cheap
            try:
                some = len(missing) < len(keys)
                pixels = (
                    pixel_values[_indices(missing, pixel_values.device)] if some else pixel_values
                )
                fresh = {"tower": self.fsr_tower(pixels)}
            finally:
                self.fsr_tap.wanted = frozenset()
            fresh |= self.fsr_tap.take()
            self.fsr_counts["tower_images"] += len(missing)
        new = {
            place: {name: value[row] for name, value in fresh.items()}
            for row, place in enumerate(missing)
        }
        result = fresh
        if len(missing) < len(keys):
            # Copies, and before the cache takes new entries: those may lie where these are.
            entries = [new.get(place) or entry for place, entry in enumerate(found)]
            result = {
                name: torch.stack([entry[name] for entry in entries if entry])
                for name in {"tower", *wanted}
            }
        for place, tensors in new.items():
            if cache is not None and (key := keys[place]):
                cache.put(key, tensors)
        return dict(result)

    # Selection
    # ------------------------------------------------------------------------------------------------------

    def _fsr_embed(
        self, pixel_values: torch.Tensor, keys: Sequence[bytes | None], plans: Sequence[ImagePlan]
    ) -> list[torch.Tensor]:
        groups: dict[tuple[str, str, int, str], list[int]] = defaultdict(list)
        for index, plan in enumerate(plans):
            if plan.pruned:
                # The text of a question is one input for a whole call, where a method reads it at
                # all.
                text = plan.question if "text" in _needs(_method(plan.method, plan.options)) else ""
                groups[plan.method, plan.options, plan.keep, text].append(index)
        clock, device = self.fsr_clock, pixel_values.device
        started = clock.start(device)
        wanted = frozenset().union(
            *(_wanted(_method(name, options)) for name, options, *_ in groups)
        )
        numbers: dict[Any, int] = {}
        source = [numbers.setdefault(key or place, len(numbers)) for place, key in enumerate(keys)]
        again = len(numbers) < len(plans)  # the same image, asked about in several ways
        firsts = [source.index(number) for number in range(len(numbers))]
        if again:
            pixel_values = pixel_values[_indices(firsts, device)]
            if self.fsr_cache is not None:
                self.fsr_cache.hits += len(plans) - len(numbers)
        signals = self._fsr_encode(pixel_values, [keys[place] for place in firsts], tapped(wanted))
        tower = signals.pop("tower")
        features, projected = self.fsr_project(tower)
        signals["metric"] = features
        if "cls_row" in wanted:
            signals["cls_row"] = self.fsr_cls_row(tower)
        if again:
            order = _indices(source, device)
            projected, signals = (
                projected[order],
                {name: value[order] for name, value in signals.items()},
            )
        clock.stop("tower", started)
        started = clock.start(device)
        # Copies: vLLM caches rows one by one, and a view would keep the whole batch's memory alive.
        rows = [
            row if plan.pruned else row.clone() for row, plan in zip(projected, plans, strict=True)
        ]
        for (name, options, keep, _), places in groups.items():
            method = _method(name, options)
            questions = [plans[place].question for place in places]
            pruned = method.prune(
                self._fsr_tokens(method, projected, signals, places, questions),
                keep,
                validate=False,
            )
            tokens = pruned.tokens
            if tensor_parallel_size() > 1:
                # Ranks must not disagree about a near tie. Rank 0's rows settle its choice and what
                # it merged.
                tokens = broadcast_from_first(tokens)
            for place, kept in zip(places, tokens, strict=True):
                rows[place] = kept
            self._fsr_count(pruned, len(places) * keep)
        clock.stop("select", started)
        self.fsr_counts["images"] += len(plans)
        self.fsr_counts["pruned_images"] += sum(plan.pruned for plan in plans)
        self.fsr_counts["selection_calls"] += len(groups)
        return rows

    def _fsr_tokens(
        self,
        method: Any,
        projected: torch.Tensor,
        signals: dict[str, torch.Tensor],
        places: list[int],
        questions: list[str],
    ) -> VisualTokens:
        """The method's inputs for one group of images of equal shape, budget and method."""
        pick = None if len(places) == projected.shape[0] else _indices(places, projected.device)

        def of_group(value: torch.Tensor) -> torch.Tensor:
            return value if pick is None else value[pick]

        needs = _needs(method)
        features = of_group(projected)
        given: dict[str, Any] = {
            name: of_group(value) for name, value in signals.items() if name in needs
        }
        for name in {*SHALLOW} & {*needs}:
            given[name] = of_group(signals[shallow_key(name, method.shallow_layer)])
        if "grid" in needs:
            side = math.isqrt(features.shape[1])
            given["grid"] = (side, features.shape[1] // side)
        if "prototypes" in needs and self._fsr_prototypes is not None:
            self._fsr_prototypes = self._fsr_prototypes.to(features.device)  # once
            given["prototypes"] = self._fsr_prototypes
        if "text" in needs:
            given["text"] = self._fsr_words.embeddings(questions[0]).to(features.device)
        if "relevance" in needs and self.fsr_text is not None:
            asked = [place for place, question in enumerate(questions) if question]
            tower = of_group(signals["metric"])
            if len(asked) == len(questions):
                relevance = self.fsr_text.relevance(tower, features, questions)
            else:
                relevance = features.new_ones(features.shape[:2], dtype=torch.float32)
            if 0 < len(asked) < len(questions):
                index = _indices(asked, features.device)
                texts = [questions[place] for place in asked]
                some = self.fsr_text.relevance(tower[index], features[index], texts)
                relevance = relevance.index_copy(0, index, some)
            given["relevance"] = relevance
        return VisualTokens(features=features, **given)

    def _fsr_count(self, pruned: Any, kept: int) -> None:
        """Add up what the method did; tensors stay on the device until somebody asks."""
        self.fsr_counts["kept"] += kept
        for name in ("k_focus", "num_scan", "num_merged"):
            value = getattr(pruned, name)
            self.fsr_counts[name] = self.fsr_counts[name] + (
                value.sum() if isinstance(value, torch.Tensor) else value
            )


def _needs(method: Any) -> tuple[str, ...]:
    return (*method.required(), *method.uses)


def _indices(places: list[int], device: torch.device) -> torch.Tensor:
    """Row numbers on the device, without waiting for it."""
    return torch.tensor(places, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _wanted(method: Any) -> set[str]:
    """What the tap has to form for a method."""
    return {*_needs(method), *shallow_keys(method)}
