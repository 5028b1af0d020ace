"""The question's side of relevance: a CLIP text tower, or the model's own embeddings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from cachetools import LRUCache
from torch import nn

from fsr_vllm.compat.model import embed_text_ids, load_parameter
from fsr_vllm.compat.types import Anything, ModelConfig, Tokenizer
from fsr_vllm.engine.encoder_source import read_config, resolved, split_revision
from fsr_vllm.signals.relevance import (
    clip_relevance,
    embedding_relevance,
    known_partner,
    pool_chunks,
    relevance_sign,
    wrap_chunks,
)

# prefix of the text side's tensors in the loader's stream and in the model's modules
WEIGHTS = "fsr_text."
CACHED_QUESTIONS = 4096  # text embeddings kept per worker: 3 kB each for CLIP-L
MAX_CHUNKS = 8  # of 75 tokens each: the end of a long text is what is read
MAX_LLM_TOKENS = (
    256  # of a question, when the language model's embeddings stand in for a text tower
)

_WAYS_OUT = (
    "give its path or name with --fsr-text-encoder PATH, use the language model's embeddings with "
    "--fsr-text-encoder llm, or do without query relevance with --fsr-text-encoder none"
)


def find_encoder(model_config: ModelConfig, setting: str, sign: str | int) -> tuple[str, int]:
    """The text encoder to load (a path or NAME@COMMIT, "llm" or "none") and the sign of its
    patch-text cosine.

    auto: MODEL/text_encoder if the model is a folder that has one, else the tower's known partner.
    There is no silent fallback: ValueError names the ways out if no encoder is known or its
    configuration cannot be read.
    """
    if setting in ("llm", "none"):
        return setting, relevance_sign(sign, None, None)
    path = setting
    if setting == "auto":
        path = os.path.join(model_config.model, "text_encoder")
        if not os.path.isdir(path):
            path = known_partner(model_config.hf_config.vision_config) or ""
        if not path:
            raise ValueError(
                f"plugin fsr knows no text encoder for this model's vision tower: {_WAYS_OUT}"
            )
    try:
        config = read_config(path)
    except Exception as error:
        raise ValueError(
            f"plugin fsr cannot load the text encoder {path!r} ({error}): {_WAYS_OUT}"
        ) from error
    width = model_config.hf_config.vision_config.hidden_size
    if config.vision_config.hidden_size != width:
        raise ValueError(
            f"text encoder {path!r} belongs to a vision tower of width "
            f"{config.vision_config.hidden_size}, this model's has {width}: {_WAYS_OUT}"
        )
    name, _ = split_revision(path)
    return resolved(path), relevance_sign(sign, name, getattr(config, "fsr_relevance_sign", None))


def plain_ids(tokenizer: Tokenizer, text: str, **options: Anything) -> list[int]:
    """Token ids of a user's text without specials: a control token that the user wrote out is left
    out.

    Otherwise `<|endoftext|>` in a message would be where CLIP pools, and `<image>` a word of the
    question. Left out rather than split into pieces (`split_special_tokens` of transformers): the
    pieces are words that nobody meant, and that option changes a tokenizer which vLLM uses at the
    same time and which has to read control tokens.
    """
    specials = set(tokenizer.all_special_ids)
    specials |= {
        number
        for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if token.special
    }
    ids = tokenizer(text, add_special_tokens=False, **options)["input_ids"]
    return [number for number in ids if number not in specials]


class _QuestionCache(LRUCache[str, torch.Tensor]):
    """Text embeddings of one worker by question; what was asked longest ago is dropped."""

    def __init__(self, encode: Callable[[str], torch.Tensor]) -> None:
        super().__init__(CACHED_QUESTIONS)
        self._encode = encode

    def __missing__(self, text: str) -> torch.Tensor:
        self[text] = self._encode(text)
        return self[text]


class ClipText(nn.Module):
    """CLIP's text tower with the vision tower's post layernorm and projection: texts and patches in
    one space.

    The modules carry the names of a published CLIP checkpoint, so its tensors load as they are.
    """

    per_patch = True  # relevance speaks of patches of the tower

    def __init__(self, path: str, sign: int, dummy: bool = False) -> None:
        super().__init__()
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        config = read_config(path)
        self.path, self.sign = path, sign
        name, revision = split_revision(path)
        self.text = CLIPTextModelWithProjection(config.text_config)
        self.visual_projection = nn.Linear(
            config.vision_config.hidden_size, config.projection_dim, bias=False
        )
        self.post_layernorm = nn.LayerNorm(
            config.vision_config.hidden_size, eps=config.vision_config.layer_norm_eps
        )
        self.requires_grad_(False)
        self._tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        self._wanted = {name for name, _ in self.named_parameters()}
        # --load-format dummy fills all parameters itself.
        self._filled = set(self._wanted) if dummy else set()
        self._max_length = config.text_config.max_position_embeddings
        self._cache = _QuestionCache(self._encode)

    def take(self, name: str, tensor: torch.Tensor) -> str | None:
        """Load one tensor of a CLIP checkpoint; returns the parameter's name, None if not ours."""
        ours = name.removeprefix("vision_model.")
        if name.startswith(("text_model.", "text_projection.")):
            ours = f"text.{name}"
            if ours not in self._wanted:  # transformers has moved this nesting before
                ours = f"text.{name.removeprefix('text_model.')}"
        if ours not in self._wanted:
            return None
        load_parameter(self.get_parameter(ours), tensor)
        self._cache.clear()
        return ours

    def clear(self) -> None:
        self._cache.clear()

    def check_loaded(self, loaded: set[str]) -> None:
        """ValueError unless all parameters were filled by `take`, now or before."""
        self._filled |= loaded
        missing = sorted(self._wanted - self._filled)
        if missing and not self._filled:
            raise ValueError(
                f"this load format does not read the text encoder {self.path!r}: {_WAYS_OUT}"
            )
        if missing:
            more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
            raise ValueError(f"text encoder {self.path!r} lacks {missing[0]}{more}: {_WAYS_OUT}")

    @torch.inference_mode()
    def _encode(self, text: str) -> torch.Tensor:
        tokenizer = self._tokenizer
        # CLIP was trained on lower-cased text; the slow tokenizer does that itself, saved fast ones
        # need not.
        ids = plain_ids(tokenizer, text.lower(), truncation=False, verbose=False)
        device = self.visual_projection.weight.device
        embeds = []
        chunks = wrap_chunks(ids, tokenizer.bos_token_id, tokenizer.eos_token_id, self._max_length)[
            -MAX_CHUNKS:
        ]
        # All full chunks in one run, then the shorter last one: this happens inside an engine step.
        for equal in (chunks[:-1], chunks[-1:]):
            if equal:
                embeds.append(self.text(input_ids=torch.tensor(equal, device=device)).text_embeds)
        return pool_chunks(torch.cat(embeds))

    def relevance(
        self, features: torch.Tensor, projected: torch.Tensor, questions: Sequence[str]
    ) -> torch.Tensor:
        """(B, N) float32, higher = more relevant, from the tower's features (B, N, Dv)."""
        texts = torch.stack([self._cache[question] for question in questions])
        return clip_relevance(
            features, texts, self.post_layernorm, self.visual_projection, self.sign
        )


class LlmText:
    """The language model's embeddings of a question: relevance without a text tower, `text` for
    methods.
    """

    per_patch = False  # relevance speaks of the rows that the language model would get

    def __init__(
        self, language_model: nn.Module, tokenizer: Callable[[], Tokenizer], sign: int
    ) -> None:
        # Not an nn.Module: it borrows the language model, which must not be registered twice.
        self._language_model, self._tokenizer, self.sign = language_model, tokenizer, sign
        self._cache = _QuestionCache(self._encode)

    @torch.inference_mode()
    def embeddings(self, text: str) -> torch.Tensor:
        """One row per token of the question, (T, D); T = 0 without a question."""
        ids = plain_ids(self._tokenizer(), text)[:MAX_LLM_TOKENS] if text else []
        device = next(self._language_model.parameters()).device
        embeds = embed_text_ids(self._language_model, torch.tensor(ids or [0], device=device))
        return embeds[: len(ids)]

    def _encode(self, text: str) -> torch.Tensor:
        return self.embeddings(text).float().mean(0)

    def clear(self) -> None:
        self._cache.clear()

    def relevance(
        self, features: torch.Tensor, projected: torch.Tensor, questions: Sequence[str]
    ) -> torch.Tensor:
        """(B, N) float32 cosine of projected patches (B, N, D) and each image's question."""
        texts = torch.stack([self._cache[question] for question in questions])
        return embedding_relevance(projected, texts, self.sign)
