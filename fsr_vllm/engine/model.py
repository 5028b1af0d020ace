"""The mixin before vLLM's model classes: it composes the encoder and the selection, and is thin."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor

from fsr_vllm.compat.model import tokenizer_of, weight_source
from fsr_vllm.compat.parallel import has_vision_tower
from fsr_vllm.compat.resets import on_runner_reset
from fsr_vllm.compat.types import Anything, ModelConfig, VllmConfig
from fsr_vllm.engine.attention_hook import AttentionHook, shallow_keys
from fsr_vllm.engine.encoder import Encoder
from fsr_vllm.engine.encoder_source import split_revision
from fsr_vllm.engine.families.base import Family, WorkerHalf
from fsr_vllm.engine.feature_cache import FeatureCache
from fsr_vllm.engine.planning import prototype_file
from fsr_vllm.engine.selection import Inputs, Selector, wanted
from fsr_vllm.engine.stats import Clock, Counts
from fsr_vllm.engine.text_encoder import WEIGHTS, ClipText, LlmText
from fsr_vllm.engine.types import ImageInput
from fsr_vllm.engine.wire import PLAN_FIELD
from fsr_vllm.methods import list_methods
from fsr_vllm.methods.prototypes import load_prototypes
from fsr_vllm.params import ServerSettings, read_settings


class FsrModelMixin:
    """Before a stock vLLM model class; inactive, it passes every call through."""

    fsr_family: ClassVar[Family]
    fsr: Pruner | None = None  # None: the plugin is not active, or this checkpoint cannot be pruned
    # Declared, not assigned: a class attribute would hide the submodule of the same name.
    fsr_text: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        settings = read_settings(vllm_config.model_config.hf_config)
        if settings is None or settings.unsupported is not None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
            self.fsr_text = None
            return
        half = self.fsr_family.worker_half()
        half.prepare(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.fsr_text = None
        # vLLM counts an image by its rows when it maps LoRA onto tower tokens, and ours are fewer
        # than the tower's.
        self.supports_tower_connector_lora = False
        tokenizer = functools.partial(tokenizer_of, vllm_config.model_config)
        sign = int(settings.relevance_sign)  # start-up has settled "auto"
        words = LlmText(self.language_model, tokenizer, sign)  # type: ignore[attr-defined]
        if settings.text_encoder not in ("none", "llm"):
            path = settings.text_encoder
            self.secondary_weights = [weight_source(*split_revision(path), WEIGHTS)]
            dummy = vllm_config.load_config.load_format == "dummy"
            self.fsr_text = ClipText(path, sign, dummy)
        relevance = words if settings.text_encoder == "llm" else self.fsr_text
        inputs = Inputs(relevance, words, _prototypes(vllm_config.model_config))
        # The scheduler packs images by the rows they leave. The tower must not be handed more at
        # once than it would get unpruned: that is what memory was profiled for.
        at_once = vllm_config.scheduler_config.max_num_batched_tokens
        self.fsr = Pruner(half(self), settings, inputs, at_once)
        on_runner_reset(self)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Stock's, and the text encoder's tensors where the loader brings them."""
        self.fsr_forget()
        text = self.fsr_text
        if text is None:
            return super().load_weights(weights)  # type: ignore[misc]
        ours: set[str | None] = set()

        def stock() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith(WEIGHTS):
                    # Copied at once: some loaders reuse their buffers after the next tensor.
                    ours.add(text.take(name.removeprefix(WEIGHTS), tensor))
                else:
                    yield name, tensor

        loaded = super().load_weights(stock())  # type: ignore[misc]
        text.check_loaded({name for name in ours if name})
        return loaded | {WEIGHTS + name for name, _ in text.named_parameters()}

    def embed_multimodal(self, **kwargs: Anything) -> Anything:
        """One tensor per image: K rows where its plan prunes it, all N otherwise."""
        packed = kwargs.pop(PLAN_FIELD, None)
        if self.fsr is None or packed is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        images = self.fsr.worker.inputs(kwargs, packed)
        if self.fsr.serves(images):
            return self.fsr.embed(images)
        self.fsr.counts.add(tower_images=len(images))
        return super().embed_multimodal(**kwargs)  # type: ignore[misc]

    def fsr_forget(self) -> None:
        """Drop all that was computed with the weights so far."""
        if self.fsr is not None:
            self.fsr.forget()


class Pruner:
    """Encoder and selection of one model, with what is counted of them."""

    def __init__(
        self, worker: WorkerHalf, settings: ServerSettings, inputs: Inputs, tokens_at_once: int
    ) -> None:
        self.worker, self._inputs, self._at_once = worker, inputs, tokens_at_once
        self.counts, self.clock = Counts(), Clock()
        shallow = frozenset().union(*map(shallow_keys, list_methods().values()))
        worker.hook = AttentionHook(worker.attention_layout(), shallow)
        capacity = settings.feature_cache_bytes if has_vision_tower() else 0
        self.encoder = Encoder(worker, FeatureCache(capacity) if capacity else None, self.counts)
        self.selector = Selector(worker, inputs, self.counts)

    def serves(self, images: Sequence[ImageInput]) -> bool:
        """Whether these images are ours: one is pruned, or may be kept in the cache."""
        cached = self.encoder.cache is not None and any(image.key for image in images)
        return cached or any(image.plan.pruned for image in images)

    def embed(self, images: Sequence[ImageInput]) -> list[Tensor]:
        """The rows of each image that vLLM gets."""
        rows: list[Tensor] = []
        for some in at_once(images, self._at_once):
            rows += self._embed(some)
        return rows

    def _embed(self, images: Sequence[ImageInput]) -> list[Tensor]:
        plans = [image.plan for image in images]
        with self.clock.timing("tower"):
            encoded = self.encoder.encode(images, wanted(plans))
        with self.clock.timing("select"):
            pruned = self.selector.select(encoded, plans)
            return [
                self.worker.finish(image, kept) for image, kept in zip(encoded, pruned, strict=True)
            ]

    def forget(self) -> None:
        """Drop cached features and questions."""
        for side in (self._inputs.words, self._inputs.relevance):
            if side is not None:
                side.clear()
        if self.encoder.cache is not None:
            self.encoder.cache.clear()

    def stats(self) -> dict[str, float]:
        """All counts and times so far; waits for the device."""
        cache = self.encoder.cache
        seconds = {f"seconds_{part}": value for part, value in self.clock.read().items()}
        return self.counts.read() | (cache.stats() if cache is not None else {}) | seconds


def at_once(images: Sequence[ImageInput], most: int) -> Iterator[list[ImageInput]]:
    """The images in runs that cost at most `most` patches each, or are one image alone."""
    run: list[ImageInput] = []
    cost = 0
    for image in images:
        if run and cost + image.cost > most:
            yield run
            run, cost = [], 0
        run.append(image)
        cost += image.cost
    yield run


def _prototypes(model_config: ModelConfig) -> Tensor | None:
    """The codebook beside the model, if any; ValueError if its rows are of another width."""
    codebook = prototype_file(model_config.model)
    if codebook is None:
        return None
    rows, width = load_prototypes(codebook), model_config.hf_config.text_config.hidden_size
    if rows.shape[1] != width:
        raise ValueError(
            f"{codebook} holds rows of {rows.shape[1]} values, this model's have {width}"
        )
    return rows
