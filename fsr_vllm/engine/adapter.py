"""Mixin for vLLM model classes: tower features -> signals -> method -> exactly K rows per image."""

from __future__ import annotations

import functools
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fsr_vllm import compat
from fsr_vllm.engine.processor import PLAN_FIELD, read_settings
from fsr_vllm.engine.text_tower import WEIGHTS, ClipText, LlmText
from fsr_vllm.methods import VisualTokens, get_method
from fsr_vllm.params import ImagePlan
from fsr_vllm.signals.saliency import attention_map, cls_attention


@functools.lru_cache(maxsize=256)
def _method(name: str, options: str) -> Any:
    return get_method(name, **json.loads(options))


class AttentionTap:
    """Reads signals off the tower's last attention layer while it runs, so that no weights are stored or recomputed."""

    def __init__(self, attention: torch.nn.Module) -> None:
        self.wanted: frozenset[str] | None = None  # signals to form; None: the layer runs untouched
        self.signals: dict[str, torch.Tensor] = {}
        attention.register_forward_pre_hook(self._read, with_kwargs=True)

    def _read(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.wanted is None:
            return
        query, key = (*args, kwargs.get("query"), kwargs.get("key"))[:2]
        ranks = compat.tensor_parallel_size()

        def over_heads(summed: torch.Tensor) -> torch.Tensor:
            total = compat.tensor_parallel_sum(summed) if ranks > 1 else summed
            return total / (layer.num_heads * ranks)

        self.signals = {"saliency": over_heads(cls_attention(query, key, layer.num_heads, layer.scale))}
        if "attention" in self.wanted:
            self.signals["attention"] = over_heads(attention_map(query, key, layer.num_heads, layer.scale))


class Clock:
    """Seconds spent in named parts: wall time on the CPU, CUDA events read when asked (never in the hot path)."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    def start(self, device: torch.device) -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, part: str, started: Any) -> None:
        if isinstance(started, float):
            self._seconds[part] += time.perf_counter() - started
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append((part, started, event))
        if len(self._events) > 1000 and self._events[0][2].query():
            self._settle(self._events.pop(0))

    def _settle(self, entry: tuple[str, Any, Any]) -> None:
        part, first, last = entry
        self._seconds[part] += first.elapsed_time(last) / 1000

    def read(self) -> dict[str, float]:
        while self._events:
            self._events[0][2].synchronize()
            self._settle(self._events.pop(0))
        return dict(self._seconds)


class FsrModelMixin:
    """Before a stock vLLM model class; inactive, it passes every call through."""

    fsr_text: Any = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        self.fsr_active = read_settings(config) is not None and self.fsr_unsupported(config) is None
        if not self.fsr_active:
            return
        settings = read_settings(config)
        assert settings is not None
        # vLLM counts an image by its rows when it maps LoRA onto tower tokens, and ours are fewer than the tower's.
        self.supports_tower_connector_lora = False
        self.fsr_tap = AttentionTap(self.fsr_attention())
        self.fsr_clock = Clock()
        self.fsr_counts: dict[str, Any] = defaultdict(int)
        # The scheduler packs images by the rows they leave. The tower must not be handed more at once than it would
        # get unpruned: that is what memory was profiled for.
        self._fsr_tokens_at_once = vllm_config.scheduler_config.max_num_batched_tokens
        self.fsr_text = self._fsr_text_side(vllm_config.model_config, settings)

    def _fsr_text_side(self, model_config: Any, settings: Any) -> Any:
        if settings.text_encoder == "none":
            return None
        if settings.text_encoder == "llm":
            tokenizer = compat.tokenizer_of(model_config)
            return LlmText(self.language_model, tokenizer, settings.relevance_sign)  # type: ignore[attr-defined]
        self.secondary_weights = [compat.weight_source(settings.text_encoder, WEIGHTS)]
        return ClipText(settings.text_encoder, settings.relevance_sign)

    # What a family provides ---------------------------------------------------------------------------------------

    @staticmethod
    def fsr_unsupported(hf_config: Any) -> str | None:
        """Why this checkpoint's images cannot be pruned, or None."""
        raise NotImplementedError

    def fsr_attention(self) -> torch.nn.Module:
        """The attention op whose [CLS] row is the saliency."""
        raise NotImplementedError

    def fsr_encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tower features (B, N, Dv), the same projected (B, N, D), and the projected [CLS] row (B, D)."""
        raise NotImplementedError

    # vLLM's calls ---------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        if not isinstance(self.fsr_text, ClipText):
            if self.fsr_text is not None:
                self.fsr_text.clear()
            return super().load_weights(weights)  # type: ignore[misc]
        ours: list[tuple[str, torch.Tensor]] = []

        def stock() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name.startswith(WEIGHTS):
                    ours.append((name.removeprefix(WEIGHTS), tensor))
                else:
                    yield name, tensor

        loaded = super().load_weights(stock())  # type: ignore[misc]
        if not ours and self.fsr_text.loaded:
            return loaded | {WEIGHTS + name for name, _ in self.fsr_text.named_parameters()}  # a weight update
        return loaded | {WEIGHTS + name for name in self.fsr_text.load_weights(ours)}

    def embed_multimodal(self, **kwargs: Any) -> Any:
        encoded = kwargs.pop(PLAN_FIELD, None)
        plans = [ImagePlan.decode(plan.numpy().tobytes()) for plan in encoded] if encoded is not None else []
        if not any(plan.pruned for plan in plans):
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        pixel_values = kwargs["pixel_values"]
        step = max(1, self._fsr_tokens_at_once // max(plan.total for plan in plans))
        rows: list[torch.Tensor] = []
        for start in range(0, len(plans), step):
            rows += self._fsr_embed(pixel_values[start : start + step], plans[start : start + step])
        return rows

    # Selection ------------------------------------------------------------------------------------------------------

    def _fsr_embed(self, pixel_values: torch.Tensor, plans: Sequence[ImagePlan]) -> list[torch.Tensor]:
        groups: dict[tuple[str, str, int], list[int]] = defaultdict(list)
        for index, plan in enumerate(plans):
            if plan.pruned:
                groups[plan.method, plan.options, plan.keep].append(index)
        wanted = {name for method, options, _ in groups for name in _needs(_method(method, options))}
        clock, device = self.fsr_clock, pixel_values.device
        started = clock.start(device)
        self.fsr_tap.wanted = frozenset(wanted)
        try:
            features, projected, cls_row = self.fsr_encode(pixel_values)
        finally:
            self.fsr_tap.wanted = None
        signals, self.fsr_tap.signals = self.fsr_tap.signals, {}
        clock.stop("tower", started)
        started = clock.start(device)
        signals |= {"metric": features, "cls_row": cls_row}
        rows = list(projected.unbind(0))
        for (name, options, keep), places in groups.items():
            method = _method(name, options)
            questions = [plans[place].question for place in places]
            pruned = method.prune(self._fsr_tokens(method, projected, signals, places, questions), keep, validate=False)
            tokens = pruned.tokens
            if compat.tensor_parallel_size() > 1:
                tokens = compat.broadcast_from_first(tokens)  # ranks must not disagree about a near tie
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
        whole = len(places) == projected.shape[0]
        pick = torch.tensor(places, device="cpu")

        def of_group(value: torch.Tensor) -> torch.Tensor:
            return value if whole else value[pick.to(value.device)]

        needs = _needs(method)
        given: dict[str, Any] = {name: of_group(value) for name, value in signals.items() if name in needs}
        features = of_group(projected)
        if "relevance" in needs and self.fsr_text is not None:
            relevance = features.new_ones(features.shape[:2], dtype=torch.float32)
            asked = [place for place, question in enumerate(questions) if question]
            if asked:
                tower = of_group(signals["metric"])
                texts = [questions[place] for place in asked]
                relevance[asked] = self.fsr_text.relevance(tower[asked], features[asked], texts)
            given["relevance"] = relevance
        return VisualTokens(features=features, **given)

    def _fsr_count(self, pruned: Any, kept: int) -> None:
        """Add up what the method did; tensors stay on the device until somebody asks."""
        self.fsr_counts["kept"] += kept
        for name in ("k_focus", "num_scan", "num_merged"):
            value = getattr(pruned, name)
            self.fsr_counts[name] = self.fsr_counts[name] + (value.sum() if isinstance(value, torch.Tensor) else value)


def _needs(method: Any) -> tuple[str, ...]:
    return (*method.needs, *method.uses)
