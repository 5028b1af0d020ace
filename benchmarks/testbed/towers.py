"""First stage of the testbed's training: a CLIP, image tower and text tower together, from nothing.

Three losses. The whole picture: [CLS] of the last layer against a caption of its objects alone,
which makes [CLS] look at objects. Regions: patches of one thing, of its digit card or of the
background, in the penultimate and the last layer, against short texts and against the very
questions that are asked about it, which makes patch-text similarity point at what a text names. And
hints: large towers know where a patch is and what stands beside it; so small a one keeps that only
if it is asked to.

`plain` trains by none of these, but as CLIPs are: [CLS] alone against texts, here of what is cut
out of a picture, in its place. Patch-text similarity then comes out inverted, as OpenAI's CLIP has
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from .captions import Region, caption, describe, regions_of, says
from .data import Pictures, pixels
from .questions import FAMILIES, ask
from .scenes import COLOURS, DIGITS, GRID, PATCH, PATCHES, SHAPES, SIDE
from .wording import CLIP_BOS, CLIP_EOS, CLIP_LENGTH

WIDTH, TEXT_WIDTH, LAYERS, TEXT_LAYERS, HEADS, JOINT = 128, 128, 5, 2, 4, 96
# What a linear reader, thrown away afterwards, should find in penultimate patches, and its number
# of values: of a thing its colour and shape, of a card those of the thing beside it and the digit,
# of every patch its row and column.
HINTS = {
    "colour": 8,
    "shape": 8,
    "card colour": 8,
    "card shape": 8,
    "digit": 10,
    "row": GRID,
    "column": GRID,
}
_HINT_WEIGHT = 0.3
CROP = 9  # patches: a cell of the scene


def build(tokenizer: Tokenizer, seed: int) -> CLIPModel:
    """An untrained CLIP of the testbed's size: 96 pixels, 8-pixel patches, five layers."""
    torch.manual_seed(seed)
    bos, eos = (tokenizer.token_to_id(token) for token in (CLIP_BOS, CLIP_EOS))
    text = {
        "hidden_size": TEXT_WIDTH, "intermediate_size": 2 * TEXT_WIDTH, "num_hidden_layers":
        TEXT_LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": CLIP_LENGTH,
        "vocab_size": tokenizer.get_vocab_size(), "bos_token_id": bos, "eos_token_id": eos,
        "pad_token_id": eos, "projection_dim": JOINT,
    }  # fmt: skip
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "image_size": SIDE, "patch_size": PATCH, "projection_dim":
        JOINT,
    }  # fmt: skip
    model = CLIPModel(
        CLIPConfig(
            text_config=text, vision_config=vision, projection_dim=JOINT, initializer_factor=1.0
        )
    )
    torch.nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.02)
    return model


def tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """CLIP's token ids of texts, (T, L) int64, the shorter ones filled up with the end token."""
    ids = [tokenizer.encode(text).ids[:CLIP_LENGTH] for text in texts]
    longest, eos = max(map(len, ids)), tokenizer.token_to_id(CLIP_EOS)
    return torch.tensor([row + [eos] * (longest - len(row)) for row in ids])


def encode(model: CLIPModel, ids: Tensor) -> Tensor:
    """Unit vectors of token ids (T, L) in the joint space, (T, 96); pooled at the first end token,
    as CLIP does.
    """
    ids = ids.to(model.device)
    hidden = model.text_model(input_ids=ids).last_hidden_state
    ends = (ids == model.config.text_config.eos_token_id).int().argmax(-1)
    pooled = hidden[torch.arange(len(ids), device=ids.device), ends]
    return F.normalize(model.text_projection(pooled).float(), dim=-1)


def look(model: CLIPModel, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Joint-space vectors of [CLS] (last layer), (B, J), and of patches (penultimate, last), (2, B,
    N, J), not unit; and the penultimate patches themselves, (B, N, 128).
    """
    states = model.vision_model(pixel_values=images, output_hidden_states=True).hidden_states
    joint = [
        model.visual_projection(model.vision_model.post_layernorm(state)).float()
        for state in states[-2:]
    ]
    return joint[1][:, 0], torch.stack([state[:, 1:] for state in joint]), states[-2][:, 1:]


def crops(model: CLIPModel, images: Tensor, patch: Tensor) -> Tensor:
    """Joint-space vectors of [CLS], last layer, where the tower is given some patches only: patch
    (R, P) -> (R, J).
    """
    vision, rows = model.vision_model, model.vision_model.embeddings(images)
    cut = torch.cat([rows[patch[:, 0] // PATCHES, :1], rows[:, 1:].flatten(0, 1)[patch]], 1)
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(cut)).last_hidden_state
    return model.visual_projection(vision.post_layernorm(hidden[:, 0])).float()


class Batch(NamedTuple):
    """What a training step needs, on the CPU: worker processes make it. B pictures, R regions, T
    texts.
    """

    images: Tensor  # (B, 96, 96, 3) uint8
    captions: Tensor  # (B, L) token ids
    texts: Tensor  # (T, L) token ids
    match: Tensor  # (R, T) 1 where the text speaks of the region
    patch: Tensor  # (P,) raster numbers of patches within the batch, B * N of them
    region: Tensor  # (P,) which region each of them belongs to
    labels: Tensor  # (len(HINTS), B * N), -100 where there is nothing to say


def draw(
    tokenizer: Tokenizer,
    data: Pictures,
    picks: np.ndarray,
    random: np.random.Generator,
    plain: bool = False,
) -> Batch:
    """A batch of pictures with texts about them; `plain`: CROP patches per region, some twice where
    it is smaller.
    """
    scenes = [data.scenes[index] for index in picks]
    images = np.array(data.images[picks])
    captions = [caption(one, random) for one in scenes]
    regions = [region for place, one in enumerate(scenes) for region in regions_of(place, one)]
    texts = sorted(
        {
            text
            for place, thing, card, _ in regions
            for text in describe(scenes[place], thing, card, random)
        }
    )
    truth = [
        [says(text, scenes[place], thing, card) for text in texts]
        for place, thing, card, _ in regions
    ]
    patch, region = [], []
    for row, (place, _, _, where) in enumerate(regions):
        if plain:
            chosen = random.choice(where, CROP, replace=len(where) < CROP).tolist()
        else:
            # A region is the mean of its patches half of the time, else one patch: maps are read
            # patch by patch later.
            chosen = list(where) if random.random() < 0.5 else [where[random.integers(len(where))]]
        patch += [place * PATCHES + number for number in chosen]
        region += [row] * len(chosen)
    read = (
        tokens(tokenizer, captions),
        tokens(tokenizer, texts),
        torch.tensor(truth, dtype=torch.float32),
    )
    found = torch.tensor(patch), torch.tensor(region), labels_of(regions, len(scenes))
    return Batch(torch.from_numpy(images), *read, *found)


def loss(model: CLIPModel, hints: torch.nn.Linear, batch: Batch, plain: bool) -> Tensor:
    """The training loss of one batch; `hints` reads penultimate patches (B * N, 128) -> all of
    HINTS side by side.
    """
    device, images, match = (
        model.device,
        pixels(batch.images, model.device),
        batch.match.to(model.device),
    )
    scale = model.logit_scale.exp().clamp(max=50.0)
    if plain:
        seen = crops(model, images, batch.patch.view(-1, CROP).to(device))
        similarity = scale * F.normalize(seen, dim=-1) @ encode(model, batch.texts).T
        return _unlikely(similarity, match, -1).mean()
    cls, maps, patches_ = look(model, images)
    logits = scale * F.normalize(cls, dim=-1) @ encode(model, batch.captions).T
    same = (
        (batch.captions[:, None] == batch.captions[None]).all(-1).to(device)
    )  # things may look alike
    target = same / same.sum(-1, keepdim=True)
    whole = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    region = batch.region.to(device)
    rows = maps.flatten(1, 2)[:, batch.patch.to(device)]
    pooled = maps.new_zeros(2, len(match), maps.shape[-1]).index_add(1, region, rows)
    similarity = scale * F.normalize(pooled, dim=-1) @ encode(model, batch.texts).T
    per_region, per_text = (_unlikely(similarity, match, side) for side in (-1, -2))
    told = hints(patches_.flatten(0, 1)).split(list(HINTS.values()), -1)
    labels = batch.labels.to(device)
    missed = [
        F.cross_entropy(part, label, reduction="sum")
        for part, label in zip(told, labels, strict=True)
    ]
    missing = (torch.stack(missed) / (labels >= 0).sum(-1).clamp(min=1)).sum()
    return 0.5 * whole + per_region.mean() + 0.5 * per_text.mean() + _HINT_WEIGHT * missing


def _unlikely(similarity: Tensor, match: Tensor, side: int) -> Tensor:
    """Mean surprise of what matches, among everything along `side`: texts (-1) or regions (-2)."""
    return -(similarity.log_softmax(side) * match).sum(side) / match.sum(side).clamp(min=1)


def labels_of(regions: Sequence[Region], count: int) -> Tensor:
    """What each patch should tell a linear reader, (len(HINTS), count * N); -100: nothing."""
    labels = torch.full((len(HINTS), count, PATCHES), -100)
    for place, thing, card, where in regions:
        if thing is None:
            continue
        colour, shape = list(COLOURS).index(thing.colour), SHAPES.index(thing.shape)
        values = (2, colour), (3, shape), (4, DIGITS.index(thing.digit or "zero"))
        for hint, value in values if card else ((0, colour), (1, shape)):
            labels[hint, place, list(where)] = value
    raster = torch.arange(PATCHES)
    labels[5], labels[6] = raster // GRID, raster % GRID
    return labels.flatten(1)


@torch.no_grad()
def gates(model: CLIPModel, tokenizer: Tokenizer, data: Pictures) -> dict[str, float]:
    """Mean AUC of penultimate [CLS] attention on things, and of question relevance on what each
    question is about.
    """
    attention: list[float] = []
    relevance: list[float] = []
    by_family: dict[str, list[float]] = {family: [] for family in FAMILIES if family != "scene"}
    for start in range(0, len(data.scenes), 50):
        scenes = data.scenes[start : start + 50]
        inside = pixels(data.images[start : start + 50], model.device)
        saliency = cls_attention(model, inside)
        maps = F.normalize(look(model, inside)[1][0], dim=-1)
        for place, one in enumerate(scenes):
            background = set(regions_of(0, one)[-1][3])
            attention.append(
                auc(saliency[place], [p for p in range(PATCHES) if p not in background])
            )
            for family in by_family:
                question = ask(one, family, one.generator)
                if question and question.targets:
                    cosines = (
                        maps[place] @ encode(model, tokens(tokenizer, [question.text]))[0]
                    ).cpu()
                    by_family[family].append(auc(cosines, list(question.targets)))
                    relevance.append(by_family[family][-1])
    result = {"cls_attention": float(np.mean(attention)), "relevance": float(np.mean(relevance))}
    return result | {
        f"relevance_{family}": float(np.mean(values)) for family, values in by_family.items()
    }


@torch.no_grad()
def cls_attention(model: CLIPModel, images: Tensor) -> Tensor:
    """Attention of [CLS] to the patches in the penultimate block, mean over heads: (B, N)."""
    from fsr_vllm.signals.saliency import cls_attention as form

    states = model.vision_model(pixel_values=images, output_hidden_states=True).hidden_states
    block: Any = model.vision_model.encoder.layers[-2]
    normed = block.layer_norm1(states[-3])
    query, key = block.self_attn.q_proj(normed), block.self_attn.k_proj(normed)
    return form(query, key, HEADS, (WIDTH // HEADS) ** -0.5) / HEADS


def auc(scores: Tensor, inside: list[int]) -> float:
    """Chance that a patch inside scores above one outside; ties count half."""
    mask = torch.zeros(GRID * GRID, dtype=torch.bool).index_fill(0, torch.tensor(inside), True)
    high, low = scores[mask.to(scores.device)], scores[~mask.to(scores.device)]
    difference = high[:, None] - low[None, :]
    return float((difference > 0).float().mean() + 0.5 * (difference == 0).float().mean())
