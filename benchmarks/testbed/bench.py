"""What a method costs in answers: a fixed set of questions, asked with the tokens that each method
keeps.

Everything runs through `fsr_vllm.get_method`, in float32, on the checkpoint that is shipped; the
server, asked the same, answers the same (`evaluate --server`).
"""

from __future__ import annotations

import copy
import multiprocessing
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fsr_vllm.methods import PrunedTokens, VisualTokens, get_method
from fsr_vllm.signals.relevance import clip_relevance, pool_chunks

from . import towers
from .data import Pictures, pixels
from .export import SHIPPED, load, stated_sign
from .language import next_words
from .probes import probe
from .questions import FAMILIES, Question, ask, balanced
from .scenes import GRID, PATCHES
from .signals import codebook, signals_of

GENERIC = "Describe the image."
_SCENES_PER_QUESTION = (
    1.6  # scenes drawn per question wanted: some have nothing to ask about, answers are balanced
)


@dataclass
class Outcome:
    """Right or wrong per question, and what selection did: means over the questions."""

    right: np.ndarray  # (questions,) bool
    words: list[str] = field(default_factory=list)
    focus_share: float = 1.0  # K_F / K, K_F before clamping
    scan: float = 0.0
    merged: float = 0.0


class Bench:
    """`per_family` questions of every family about one split, and all signals of the pictures they
    are about.
    """

    def __init__(
        self, split: str, per_family: int, folder: Path = SHIPPED, device: str = "cpu"
    ) -> None:
        clip, reader, self.wording, self.clip_tokenizer = load(folder)
        self.clip, self.reader, self.device = clip.to(device), reader.to(device), device
        self.batch = 64 if device == "cpu" else 512
        self.sign = stated_sign(folder)
        count = int(per_family * _SCENES_PER_QUESTION) + 20
        self.pictures = Pictures.of(split, count)
        self.items: list[tuple[int, Question]] = []
        for number, family in enumerate(FAMILIES):
            asked = [
                ask(one, family, np.random.default_rng([7, number, one.index]))
                for one in self.pictures.scenes
            ]
            chosen = {
                id(question)
                for question in balanced([found for found in asked if found], per_family)
            }
            self.items += [
                (index, found) for index, found in enumerate(asked) if found and id(found) in chosen
            ]
        self._index()
        self.signals = self._signals()
        self._texts: dict[str, Tensor] = {}
        self._codebook: list[Tensor] = []
        self._words = {token: word for word, token in self.wording.tokenizer.get_vocab().items()}

    def _index(self) -> None:
        self.families = np.array([question.family for _, question in self.items])
        self.scene_of = np.array([index for index, _ in self.items])
        self.answers = torch.tensor(
            [self.wording.answer(question.answer) for _, question in self.items]
        )

    def subset(self, rows: np.ndarray) -> Bench:
        """A bench of some of the questions, by their numbers; it shares all signals."""
        part = copy.copy(self)
        part.items = [self.items[row] for row in rows]
        part._index()
        return part

    def majority(self) -> dict[str, float]:
        """The share of each family's most frequent answer: what answering blindly would score."""
        counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for _, question in self.items:
            counts[question.family][question.answer] += 1
        return {family: max(by.values()) / sum(by.values()) for family, by in counts.items()}

    def off(self) -> Outcome:
        """All tokens."""
        return self._run(lambda rows, _: self.signals["features"][self._scenes(rows)])

    def oracle(self, budget: int) -> Outcome:
        """Patches of what is asked about first, others at random: a ceiling that no method can
        know.
        """
        draw = torch.Generator().manual_seed(0)
        chance = torch.rand(len(self.items), PATCHES, generator=draw)
        for row, (_, question) in enumerate(self.items):
            chance[row, list(question.targets)] += 1

        def rows_of(rows: np.ndarray, _: Outcome) -> Tensor:
            kept = chance[torch.from_numpy(rows)].topk(budget).indices.sort(-1).values
            features = self.signals["features"][self._scenes(rows)]
            return features.gather(
                1, kept[..., None].expand(-1, -1, features.shape[2]).to(self.device)
            )

        return self._run(rows_of)

    def method(
        self,
        name: str,
        budget: int,
        options: dict[str, Any] | None = None,
        *,
        text: str = "",
        sign: int = 1,
    ) -> Outcome:
        """One method; `text` instead of every question, `sign` on top of the tower's own are the
        controls.
        """
        method = get_method(name, **(options or {}))
        read = {*method.needs, *method.uses}

        def rows_of(rows: np.ndarray, outcome: Outcome) -> Tensor:
            kept: list[Tensor] = [torch.empty(0)] * len(rows)
            for places in self._alike(rows, read):
                some = rows[places]
                pruned = method.prune(
                    self._tokens(some, read, name, text, sign), budget, validate=False
                )
                self._count(outcome, pruned, budget)
                for place, tokens in zip(places, pruned.tokens, strict=True):
                    kept[place] = tokens
            return torch.stack(kept)

        return self._run(rows_of)

    # The way of a batch
    # ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self, rows_of: Callable[[np.ndarray, Outcome], Tensor]) -> Outcome:
        outcome, right = Outcome(np.zeros(0, bool), focus_share=0.0), []
        for start in range(0, len(self.items), self.batch):
            rows = np.arange(start, min(start + self.batch, len(self.items)))
            texts = [self.items[row][1].text for row in rows]
            best = (
                next_words(self.reader, self.wording, rows_of(rows, outcome), texts)
                .argmax(-1)
                .cpu()
            )
            outcome.words += [self._words[token].removeprefix("Ġ") for token in best.tolist()]
            right.append((best == self.answers[start : start + self.batch]).numpy())
        outcome.right = np.concatenate(right)
        for name in ("focus_share", "scan", "merged"):
            setattr(outcome, name, getattr(outcome, name) / len(self.items))
        return outcome

    def _alike(self, rows: np.ndarray, read: set[str]) -> list[list[int]]:
        """Places within `rows` that go in one call: inputs of one shape."""
        if not read & {"text", "probe"}:
            return [list(range(len(rows)))]
        groups: dict[int, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            groups[len(self.wording.question(self.items[row][1].text))].append(place)
        return list(groups.values())

    def _tokens(
        self, rows: np.ndarray, read: set[str], name: str, text: str, sign: int
    ) -> VisualTokens:
        index = self._scenes(rows)
        given: dict[str, Any] = {
            key: value[index] for key, value in self.signals.items() if key in read
        }
        given |= {
            key: self.signals[f"{key}@{name}"][index] for key in read if key.startswith("shallow_")
        }
        questions = [text or self.items[row][1].text for row in rows]
        if "relevance" in read:
            embedded = torch.stack([self._text(question) for question in questions])
            vision = self.clip.vision_model
            projection = self.clip.visual_projection
            metric = self.signals["metric"][index]
            given["relevance"] = sign * clip_relevance(
                metric, embedded, vision.post_layernorm, projection, self.sign
            )
        if "text" in read:
            ids = [self._ids(question) for question in questions]
            given["text"] = self.reader.llama.model.embed_tokens(
                torch.tensor(ids, device=self.device)
            )
        if "probe" in read:
            given["probe"] = probe(
                name, self.reader, self.wording, self.signals["features"][index], questions
            )
        if "grid" in read:
            given["grid"] = (GRID, GRID)
        if "frame_weights" in read:
            given["frame_weights"] = torch.ones(len(rows), 1, device=self.device)
        if "prototypes" in read:
            given["prototypes"] = self._prototypes().to(self.device)
        return VisualTokens(features=self.signals["features"][index], **given)

    @staticmethod
    def _count(outcome: Outcome, pruned: PrunedTokens, budget: int) -> None:
        outcome.focus_share += float(pruned.k_focus.sum()) / budget
        outcome.scan += float(pruned.num_scan.sum())
        outcome.merged += float(pruned.num_merged.sum())

    # Signals
    # ---------------------------------------------------------------------------------------------

    def _scenes(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.scene_of[rows]).to(self.device)

    def _ids(self, text: str) -> list[int]:
        return self.wording.tokenizer.encode(text, add_special_tokens=False).ids

    def _text(self, question: str) -> Tensor:
        if question not in self._texts:
            self._texts[question] = pool_chunks(
                towers.encode(self.clip, towers.tokens(self.clip_tokenizer, [question]))
            )
        return self._texts[question]

    @torch.inference_mode()
    def _signals(self) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = defaultdict(list)
        for start in tqdm(
            range(0, len(self.pictures.scenes), self.batch),
            desc="signals",
            unit="batch",
            mininterval=1,
        ):
            inside = pixels(self.pictures.images[start : start + self.batch], self.device)
            for name, value in signals_of(self.clip, inside).items():
                parts[name].append(value)
        signals = {name: torch.cat(values) for name, values in parts.items()}
        signals["features"] = self.reader.project(signals["metric"])
        signals["cls_row"] = self.reader.project(signals["cls_row"])
        return signals

    def _prototypes(self) -> Tensor:
        if not self._codebook:
            self._codebook.append(codebook(self.clip, self.reader))
        return self._codebook[0]


def pool_of(jobs: int, device: str) -> ProcessPoolExecutor:
    """Worker processes that may use the device: CUDA does not survive a fork."""
    return ProcessPoolExecutor(
        jobs, multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    )
