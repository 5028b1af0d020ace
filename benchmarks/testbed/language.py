"""Second stage of the testbed's training: projector and language model read the frozen tower, on
all tokens always.

Pruned inputs are never trained on: what pruning costs is measured on a model that does not expect
it. Many questions about a picture share one prefix: every question attends to the picture and to
itself, with positions as if alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from .questions import FAMILIES, Question, ask
from .scenes import PATCHES, Scene
from .wording import BOS, EOS, PAD

WIDTH, LAYERS, HEADS = 128, 4, 4
QUESTIONS_PER_PICTURE = 16
LONGEST = 14  # tokens of a question with its answer, at most
# How often each family is drawn in training: look-ups that take longest to be learned come most
# often.
MIX = {
    "attribute": 3,
    "object": 4,
    "existence": 3,
    "digit": 3,
    "scene": 1,
    "count": 2,
    "relation": 3,
}
# From two thirds of the steps on: what is known by then is only kept in mind.
LATE_MIX = {
    "attribute": 1,
    "object": 1,
    "existence": 2,
    "digit": 8,
    "scene": 2,
    "count": 1,
    "relation": 6,
}
# of the end token in the loss, against 1 of the answer; the end is easily learned, yet must be
_END_WEIGHT = 0.2


class Reader(nn.Module):
    """LLaVA's projector (two layers, GELU) and a small Llama."""

    def __init__(self, tower_width: int, vocabulary: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, vocab_size=vocabulary,
            max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False,
            attn_implementation="sdpa",
        )  # fmt: skip
        self.linear_1, self.linear_2 = nn.Linear(tower_width, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.llama = LlamaForCausalLM(config)

    def project(self, features: Tensor) -> Tensor:
        """Tower rows (..., Dv) to rows of the language model (..., D)."""
        return self.linear_2(F.gelu(self.linear_1(features)))


@dataclass(frozen=True)
class Wording:
    """The language model's tokenizer, as LLaVA's chat template uses it around a picture."""

    tokenizer: Tokenizer

    @functools.cached_property
    def head(self) -> list[int]:
        """Token ids before the picture."""
        return [self._special(BOS), *self._ids("USER: ")]

    @functools.cached_property
    def end(self) -> int:
        """The token that ends an answer."""
        return self._special(EOS)

    @functools.cached_property
    def pad(self) -> int:
        """A token that is never read."""
        return self._special(PAD)

    @functools.cache  # noqa: B019  (one Wording per run)
    def question(self, text: str) -> tuple[int, ...]:
        """Token ids after the picture, up to where the answer begins."""
        return tuple(self._ids(f"\n{text} ASSISTANT:"))

    @functools.cache  # noqa: B019
    def answer(self, word: str) -> int:
        """The one token of an answer."""
        (token,) = self._ids(f" {word}")
        return token

    def _special(self, token: str) -> int:
        number = self.tokenizer.token_to_id(token)
        assert number is not None, token
        return number

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def draw(
    scene: Scene,
    random: np.random.Generator,
    count: int = QUESTIONS_PER_PICTURE,
    late: bool = False,
) -> list[Question]:
    """Questions about a scene in the training mix; fewer where it has too little to ask about."""
    shares = np.array([(LATE_MIX if late else MIX)[family] for family in FAMILIES], float)
    drawn = random.choice(list(FAMILIES), count, p=shares / shares.sum())
    found = {}
    for family in drawn:
        question = ask(scene, str(family), random)
        if question is not None:
            found[question.text] = question
    return list(found.values())


class Packed(NamedTuple):
    """Questions about B pictures with their answers, side by side behind each picture; on the CPU,
    or as `loss` has it.

    Every tensor but `places` is (B, L); `places` is (B, 2Q): where in L the answers and the ends
    are predicted.
    """

    ids: Tensor
    segment: Tensor  # which question a token belongs to, from 1; 0: padding
    position: Tensor  # from the picture's end, as if each question were alone
    places: Tensor
    wanted: Tensor  # (B, 2Q) the tokens to be predicted there
    weight: Tensor  # (B, 2Q) float, 0 where there is none


def pack(wording: Wording, questions: Sequence[Sequence[Question]], length: int = 0) -> Packed:
    """A row of `length` tokens for each picture; 0: as long as the longest one needs. ValueError:
    it needs more.
    """
    rows = [
        [(*wording.question(one.text), wording.answer(one.answer)) for one in asked]
        for asked in questions
    ]
    longest = max(sum(map(len, row)) for row in rows)
    if length and longest > length:
        raise ValueError(f"questions take {longest} tokens, more than {length}")
    shape, most = (len(rows), length or longest), 2 * max(QUESTIONS_PER_PICTURE, *map(len, rows))
    ids, segment, position = (
        torch.full(shape, wording.pad),
        torch.zeros(shape).long(),
        torch.zeros(shape).long(),
    )
    places, wanted = (torch.zeros(len(rows), most).long() for _ in range(2))
    weight = torch.zeros(len(rows), most)
    for index, row in enumerate(rows):
        start = 0
        for number, tokens in enumerate(row):
            stop = start + len(tokens)
            ids[index, start:stop] = torch.tensor(tokens)
            segment[index, start:stop] = number + 1
            position[index, start:stop] = torch.arange(len(tokens))
            pair = slice(2 * number, 2 * number + 2)
            places[index, pair] = torch.tensor([stop - 2, stop - 1])
            wanted[index, pair] = torch.tensor([tokens[-1], wording.end])
            weight[index, pair] = torch.tensor([1.0, _END_WEIGHT])
            start = stop
    return Packed(ids, segment, position, places, wanted, weight)


class Loss(nn.Module):
    """Cross-entropy of answers and ends, for (B, N, Dv) tower features and the packed questions
    about each picture.
    """

    def __init__(self, reader: Reader, wording: Wording) -> None:
        super().__init__()
        self.reader = reader
        self.register_buffer("head", torch.tensor(wording.head), persistent=False)

    def forward(self, features: Tensor, *packed: Tensor) -> Tensor:
        """The mean over all answers and ends, by their weights."""
        asked, reader = Packed(*packed), self.reader
        hidden = self._hidden(features, asked)
        prefix = hidden.shape[1] - asked.ids.shape[1]
        there = (prefix + asked.places)[..., None].expand(-1, -1, hidden.shape[2])
        logits = reader.llama.lm_head(hidden.gather(1, there)).float().flatten(0, 1)
        each = F.cross_entropy(logits, asked.wanted.flatten(), reduction="none")
        return (each * asked.weight.flatten()).sum() / asked.weight.sum()

    def _hidden(self, features: Tensor, asked: Packed) -> Tensor:
        """Last hidden states of [head, picture, questions side by side]."""
        device, batch = features.device, features.shape[0]
        embed = self.reader.llama.model.embed_tokens
        start = embed(self.head).expand(batch, -1, -1)
        rows = torch.cat(
            [start, self.reader.project(features).to(start.dtype), embed(asked.ids)], 1
        )
        prefix = start.shape[1] + features.shape[1]
        block = F.pad(asked.segment, (prefix, 0))
        order = torch.arange(rows.shape[1], device=device)
        first = order < prefix
        sees = (first[None, None, :] | (block[:, :, None] == block[:, None, :])) & (
            order[:, None] >= order[None, :]
        )
        mask = torch.zeros(sees.shape, device=device, dtype=rows.dtype)
        mask = mask.masked_fill(~sees, torch.finfo(rows.dtype).min)[:, None]
        positions = torch.cat([order[:prefix].expand(batch, -1), prefix + asked.position], 1)
        return self.reader.llama.model(
            inputs_embeds=rows, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state


@torch.inference_mode()
def next_words(reader: Reader, wording: Wording, visual: Tensor, texts: Sequence[str]) -> Tensor:
    """Logits of the first answer token, (B, V), for (B, K, D) projected rows (all, or what a method
    kept).
    """
    ids = [wording.question(text) for text in texts]
    longest, head = max(map(len, ids)), torch.tensor(wording.head)
    embed, batch = reader.llama.model.embed_tokens, visual.shape[0]
    padded = torch.tensor(
        [[*row, *[wording.pad] * (longest - len(row))] for row in ids], device=visual.device
    )
    start = embed(head.to(visual.device)).expand(batch, -1, -1)
    rows = torch.cat([start, visual, embed(padded)], 1)
    # Padding stands at the end, where a causal model cannot look back from the tokens that are
    # read.
    hidden = reader.llama.model(inputs_embeds=rows, use_cache=False).last_hidden_state
    last = (
        torch.tensor([len(row) for row in ids], device=visual.device)
        + len(head)
        + visual.shape[1]
        - 1
    )
    return reader.llama.lm_head(hidden[torch.arange(batch, device=visual.device), last])


def accuracy(
    reader: Reader, wording: Wording, features: Tensor, scenes: Sequence[Scene], seed: int = 0
) -> dict[str, float]:
    """Share of right answers per family on all tokens; the whole vocabulary competes."""
    assert features.shape[1] == PATCHES
    result = {}
    for number, family in enumerate(FAMILIES):
        random = np.random.default_rng([seed, number])
        asked = [
            (i, question) for i, one in enumerate(scenes) if (question := ask(one, family, random))
        ]
        right = 0
        for start in range(0, len(asked), 64):
            some = asked[start : start + 64]
            visual = reader.project(features[[i for i, _ in some]].float())
            best = (
                next_words(reader, wording, visual, [question.text for _, question in some])
                .argmax(-1)
                .tolist()
            )
            wanted = [wording.answer(question.answer) for _, question in some]
            right += sum(token == answer for token, answer in zip(best, wanted, strict=True))
        result[family] = right / len(asked)
    return result
