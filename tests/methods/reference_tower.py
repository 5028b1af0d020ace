"""What a method keeps of an image, from what the vision tower computed: float64, one image, no
production code.

Written from the documented behaviour of the authors' programs, input included: which attention, of
which layer, over which queries, and in which space distances are measured. `Tower` holds what
transformers reports with eager attention: `states[l]` (1 + N, C) for l = 0 .. L, where states[l]
goes into block l, and `attentions[l]` (H, 1 + N, 1 + N) of block l. [CLS] is row 0; results are
places among the N patches, ascending.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass
class Tower:
    states: list[np.ndarray]
    attentions: list[np.ndarray]
    queries: Callable[
        [int], np.ndarray
    ]  # by block: (1 + N, C) after the projection, heads side by side
    keys: Callable[[int], np.ndarray]
    project: Callable[
        [np.ndarray], np.ndarray
    ]  # rows of the tower's width -> rows of the language model's
    side: int

    @property
    def rows(self) -> np.ndarray:
        """The patch rows LLaVA takes: hidden_states[-2] without [CLS]."""
        return self.states[-2][1:]

    def cls(self, block: int) -> np.ndarray:
        """Attention of [CLS] to the patches, summed over the heads."""
        return self.attentions[block][:, 0, 1:].sum(0)

    def received(self, block: int) -> np.ndarray:
        """Attention a patch gets: mean over the heads, mean over all queries, the [CLS] column
        dropped.
        """
        return self.attentions[block].mean(0).mean(0)[1:]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def descending(score: np.ndarray) -> list[int]:
    return list(np.argsort(-score, kind="stable"))


def fastervlm(tower: Tower, k: int) -> list[int]:
    return sorted(descending(tower.cls(-2))[:k])


def hiprune(tower: Tower, k: int, alpha: float = 0.1) -> list[int]:
    """Layer 9 counted from 1 finds anchors, each with the places -1, +1, -side and +side, clamped
    to the image.
    """
    shallow, deep = tower.received(9 - 1), tower.received(-2).copy()
    anchors = np.array(descending(shallow)[: round(k * alpha / 5)], dtype=int)
    around = np.concatenate([anchors + step for step in (0, -1, 1, -tower.side, tower.side)])
    kept = set(np.clip(around, 0, len(deep) - 1).tolist())
    deep[list(kept)] -= 1.0
    return sorted(kept | set(descending(deep)[: k - len(kept)]))


def scope(tower: Tower, k: int, alpha: float = 1.0, combine: str = "product") -> list[int]:
    """Cosines of the tower's own rows; saliency summed over the heads."""
    rows, weight = unit(tower.rows), tower.cls(-2) ** alpha
    similarity = rows @ rows.T
    covered, kept = np.zeros(len(rows)), []
    for _ in range(k):
        gain = np.maximum(similarity - covered[:, None], 0).sum(0)
        gain = gain * weight if combine == "product" else gain + weight
        gain[kept] = -np.inf
        kept.append(int(gain.argmax()))
        covered = np.maximum(covered, similarity[kept[-1]])
    return sorted(kept)


def holov(tower: Tower, k: int, crops: int = 16) -> list[int]:
    """Projected rows in runs of the raster; quotas by mean score, what is left to the heaviest; by
    attention.
    """
    rows, attention = tower.project(tower.rows), tower.cls(-2) / len(tower.attentions[-2])
    places = np.array_split(np.arange(len(rows)), crops)
    score = []
    for own in places:
        similarity = unit(rows[own]) @ unit(rows[own]).T
        np.fill_diagonal(similarity, 0)
        mean = similarity.sum(1) / (len(own) - 1)
        spread = ((similarity - mean[:, None]) ** 2).sum(1) / (len(own) - 1)
        scaled = 1000 * attention[own]
        score.append(np.mean(scaled + 0.09 * spread * scaled.mean() / (spread.mean() + 1e-6)))
    share = np.array(score) / sum(score)
    quota = np.floor(share * k).astype(int)
    for crop in descending(share)[: k - quota.sum()]:
        quota[crop] += 1
    assert all(q <= len(own) for q, own in zip(quota, places, strict=True)), (
        "the program would fill up with zeros"
    )
    return sorted(
        own[i] for q, own in zip(quota, places, strict=True) for i in descending(attention[own])[:q]
    )


def vispruner(tower: Tower, k: int) -> list[int]:
    """Half by [CLS] attention; of the others, in that order, 8 at a time of those most like one at
    an odd place.
    """
    order, rows = descending(tower.cls(-2)), unit(tower.rows)
    important, rest = order[: k // 2], order[k // 2 :]
    while len(rest) > k - k // 2:
        even, odd = rest[::2], rest[1::2]
        closest = (rows[even] @ rows[odd].T).max(1)
        drop = min(8, len(rest) - (k - k // 2))
        rest = [even[i] for i in descending(closest)[drop:]] + odd
    return sorted(important + rest)


def vscan(tower: Tower, k: int, window: int = 6) -> tuple[list[int], np.ndarray]:
    """Windows by block 5, counted from 0; the rest by the late layer; discarded rows averaged into
    the nearest.
    """
    shallow, deep = tower.cls(5).reshape(tower.side, tower.side), tower.cls(-2).copy()
    corners = [(y, x) for y in range(0, tower.side, window) for x in range(0, tower.side, window)]
    kept = []
    for y, x in corners:
        inside = [
            (r, c)
            for r in range(y, min(y + window, tower.side))
            for c in range(x, min(x + window, tower.side))
        ]
        inside.sort(key=lambda place: -shallow[place])
        kept += [r * tower.side + c for r, c in inside[: k // 2 // len(corners)]]
    deep[kept] = 0
    kept = sorted(kept + descending(deep)[: k - len(kept)])
    rows = tower.project(tower.rows)
    near = (unit(rows) @ unit(rows[kept]).T).argmax(1)
    near[kept] = np.arange(k)
    return kept, np.stack([rows[near == slot].mean(0) for slot in range(k)])


def visionzip(tower: Tower, k: int, heads: int) -> np.ndarray:
    """Rows, projected: [CLS] and the most attended, then centres plus the mean of what is nearest
    by mean keys.
    """
    contextual = int(10 / 64 * k + 0.5)
    dominant = [0, *(place + 1 for place in descending(tower.cls(-2))[: k - contextual - 1])]
    rest = [place for place in range(len(tower.states[-2])) if place not in dominant]
    metric = unit(tower.keys(-2).reshape(len(tower.states[-2]), heads, -1).mean(1))[rest]
    target = np.arange(0, len(rest), max(1, len(rest) // contextual))[:contextual]
    merged = [place for place in range(len(rest)) if place not in target]
    nearest = (metric[merged] @ metric[target].T).argmax(1)
    states, found = tower.states[-2][rest], [tower.states[-2][dominant]]
    for slot, centre in enumerate(target):
        members = states[merged][nearest == slot]
        found.append((states[centre] + (members.mean(0) if len(members) else 0))[None])
    return tower.project(np.concatenate(found))


def prumerge_plus(tower: Tower, block: int, neighbours: int = 32) -> tuple[int, np.ndarray]:
    """How many rows the program makes of this image, and these rows, projected; queries and keys of
    `block`.
    """
    query, key, rows = tower.queries(block)[0], tower.keys(block), tower.rows
    logits = key @ query * key.shape[1] ** -0.5
    attention = (np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())[1:]
    first, third = np.percentile(attention, (25, 75))
    ratio = np.count_nonzero(attention > third + 1.5 * (third - first)) / len(rows)
    centres = descending(attention)[: round(len(rows) * ratio)]
    centres += [
        place for place in range(0, len(rows) - 1, int(int(1 / ratio) / 3)) if place not in centres
    ]
    near = unit(key[1:])
    made = []
    for centre in centres:
        others = [place for place in descending(near @ near[centre]) if place != centre][
            :neighbours
        ]
        made.append(rows[centre] + attention[others] @ rows[others])
    left = [place for place in range(len(rows)) if place not in centres]
    made.append(attention[left] @ rows[left])
    return len(made), tower.project(np.stack(made))


def vflowopt(tower: Tower, threshold: float) -> list[int]:
    """Places by importance, best first: what the tokens that receive most attend to, patch to
    patch.
    """
    attention = tower.attentions[-2].mean(0)[1:, 1:]
    received = attention.mean(0)
    giver = received > threshold * received.mean()
    return descending(attention[giver].mean(0) if giver.any() else attention[received.argmax()])
