"""The selection rules of eight rivals as their papers and programs state them: float64, plain
loops, one image.

Nothing of the production code is used. Every function returns the kept tokens in ascending order.
`margin` collects by how much each decision was made: where the narrowest is near float32's
rounding, another answer would be no mistake.
"""

from __future__ import annotations

import math

import numpy as np


def best(score, candidates, margin) -> int:
    """The candidate of highest score, the first of equals."""
    ranked = sorted(candidates, key=lambda i: (-score[i], i))
    if len(ranked) > 1:
        margin.append(score[ranked[0]] - score[ranked[1]])
    return ranked[0]


def top(score, candidates, k, margin) -> list[int]:
    ranked = sorted(candidates, key=lambda i: (-score[i], i))
    if 0 < k < len(ranked):
        margin.append(score[ranked[k - 1]] - score[ranked[k]])
    return ranked[:k]


def cosines(a, b):
    out = np.zeros((len(a), len(b)))
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            out[i, j] = x @ y / (np.sqrt(x @ x) * np.sqrt(y @ y))
    return out


def cdpruner(features, relevance, k, margin, weighting="product", theta=0.5, among=None):
    """1: `among` holds the relevance of all tiles, whose minimum and maximum count."""
    among = relevance if among is None else among
    r = (relevance - among.min() + 1e-6) / (among.max() - among.min())
    if weighting == "exp":
        r = np.exp(theta / (2 * (1 - theta)) * r)
    n, similarity = len(r), cosines(features, features)
    kernel = np.array([[r[i] * similarity[i, j] * r[j] for j in range(n)] for i in range(n)])
    left, rows, picks = np.diag(kernel).copy(), [], []
    for _ in range(k):
        j = best(left, [i for i in range(n) if i not in picks], margin)
        row = (kernel[j] - sum((c[j] * c for c in rows), np.zeros(n))) / np.sqrt(left[j])
        rows.append(row)
        left = left - row**2
        picks.append(j)
    return sorted(picks)


def farthest(similarity, picks, k, margin):
    picks = list(picks)
    while len(picks) < k:
        rest = [i for i in range(len(similarity)) if i not in picks]
        picks.append(
            best({i: min(1 - similarity[i, j] for j in picks) for i in rest}, rest, margin)
        )
    return sorted(picks)


def divprune(features, k, margin):
    similarity, every = cosines(features, features), range(len(features))
    nearest = {i: min(1 - similarity[i, j] for j in every if j != i) for i in every}
    return farthest(similarity, [best(nearest, every, margin)], k, margin)


def scope(space, saliency, k, margin, alpha=1.0, combine="product", heads=16):
    similarity, every, picks = cosines(space, space), range(len(space)), []
    cover = np.zeros(len(space))
    for _ in range(k):
        rest = [j for j in every if j not in picks]
        gain = {j: sum(max(0, similarity[i, j] - cover[i]) for i in every) for j in rest}
        if combine == "product":
            gain = {j: value * saliency[j] ** alpha for j, value in gain.items()}
        else:  # saliency summed over the heads, and no weight between the two
            gain = {j: value + (heads * saliency[j]) ** alpha for j, value in gain.items()}
        picks.append(best(gain, rest, margin))
        cover = np.maximum(cover, similarity[:, picks[-1]])
    return sorted(picks)


def zspaprune(features, text, k, margin, core_share=0.6):
    prompt = np.array([sum(column) / len(text) for column in text.T])
    relevance = cosines(features, prompt[None])[:, 0]
    core = top(relevance, range(len(features)), max(1, math.floor(core_share * k + 0.5)), margin)
    return farthest(cosines(features, features), core, k, margin)


def codebook(features, prototypes, k, margin):
    redundancy = [max(row) for row in cosines(features, prototypes)]
    return sorted(top([-value for value in redundancy], range(len(features)), k, margin))


def hiprune(received, shallow, grid, k, margin, alpha=0.1, edges="code"):
    (h, w), every = grid, range(len(received))
    kept = top(shallow, every, round(k * alpha / 5), margin)
    if len(kept) > 1:  # their order decides which neighbours are left out
        margin += [shallow[a] - shallow[b] for a, b in zip(kept, kept[1:], strict=False)]
    for place in list(kept):
        y, x = divmod(place, w)
        for row, column in ((y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x)):
            near = row * w + column
            if edges == "code":
                near = max(0, min(h * w - 1, near))
            elif not (0 <= row < h and 0 <= column < w):
                continue
            if near not in kept:
                kept.append(near)
    kept = kept[:k]
    return sorted(kept + top(received, [i for i in every if i not in kept], k - len(kept), margin))


def holov(features, saliency, k, margin, rule="code", crops=16, gamma=0.09, tau=1.0):
    n = len(saliency)
    crops = min(crops or max(1, int(1.778 * n / k)), n)
    parts = [list(map(int, part)) for part in np.array_split(np.arange(n), crops)]
    attention, score = 1000 * saliency, np.zeros(n)
    for part in parts:
        similarity, m, spread = cosines(features[part], features[part]), len(part), []
        for i in range(m):
            similarity[i, i] = 0
            mean = sum(similarity[i]) / max(1, m - 1)
            spread.append(sum((value - mean) ** 2 for value in similarity[i]) / max(1, m - 1))
        scale = np.mean(np.abs(attention[part])) / (
            np.mean(np.abs(spread)) + 1e-6
        )  # over this crop
        score[part] = attention[part] + gamma * scale * np.array(spread)

    weight = [np.mean(score[part]) ** tau for part in parts]
    share, full = [0.0] * crops, []
    while True:  # what exceeds a crop goes to the others, in proportion, until nothing does
        rest = [c for c in range(crops) if c not in full]
        free = k - sum(len(parts[c]) for c in full)
        for c in rest:
            share[c] = free * weight[c] / sum(weight[c] for c in rest)
        over = [c for c in rest if share[c] > len(parts[c])]
        if not over:
            break
        for c in over:
            share[c] = len(parts[c])
        full += over
    quota = [math.floor(value + 1e-9) for value in share]
    room = [c for c in range(crops) if quota[c] < len(parts[c])]
    if len(room) > 1:  # a single one gets exactly what is left
        margin += [abs(share[c] - round(share[c])) for c in room]
    for c in top([w / max(weight) for w in weight], room, k - sum(quota), margin):
        quota[c] += 1
    kept = []
    for part, number in zip(parts, quota, strict=True):
        kept += top(score / 1000 if rule == "paper" else saliency, part, number, margin)
    return sorted(kept)


def vscan(features, saliency, shallow, grid, k, margin, window=6):
    """The kept tokens, their rows, and where each other token went."""
    (h, w), every = grid, range(len(saliency))
    corners = [(y, x) for y in range(0, h, window) for x in range(0, w, window)]
    local = []
    for y, x in corners:
        inside = [i for i in every if y <= i // w < y + window and x <= i % w < x + window]
        local += top(shallow, inside, (k // 2) // len(corners), margin)
    others = [i for i in every if i not in local]
    kept = sorted(local + top(saliency, others, k - len(local), margin))
    similarity, into = cosines(features, features[kept]), {}
    for i in every:
        if i not in kept:
            into[i] = kept[best(similarity[i], range(k), margin)]
    rows = []
    for j in kept:
        group = [j] + [i for i, target in into.items() if target == j]
        rows.append(sum(features[i] for i in group) / len(group))
    return kept, np.array(rows), [into.get(i, -1) for i in every]
