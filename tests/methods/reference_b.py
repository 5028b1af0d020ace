"""The rules of nine more rivals as their papers and programs state them: float64, plain loops, one
image.

Nothing of the production code is used. Every function returns the kept places in ascending order,
and where rows are merged also these rows and, for each token, the place that took it in (else -1).
`margin` collects by how much each decision was made: where the narrowest is near float32's
rounding, another answer would be no mistake.
"""

from __future__ import annotations

import math

import numpy as np


def ranked(score, candidates, margin, *cuts) -> list[int]:
    """Best first, ties to the lower index; the gap at each of `cuts` is noted, or every gap where
    none is given.
    """
    order = sorted(candidates, key=lambda i: (-score[i], i))
    for cut in cuts or range(1, len(order)):
        if 0 < cut < len(order):
            margin.append(score[order[cut - 1]] - score[order[cut]])
    return order


def cos(x, y) -> float:
    return float(x @ y / (math.sqrt(x @ x) * math.sqrt(y @ y)))


def softmax(x):
    e = [math.exp(v - max(x)) for v in x]
    return np.array([v / sum(e) for v in e])


def answer(rows: dict, n: int, into: dict):
    """Rows by place and targets by token, in the order in which the library gives them."""
    kept = sorted(rows)
    return (
        kept,
        np.array([rows[i] for i in kept]),
        [-1 if i in rows else into.get(i, -1) for i in range(n)],
    )


def vispruner(saliency, space, k, margin, ratio=0.5, step=8):
    n, important = len(saliency), int(k * ratio)
    order = ranked(saliency, range(n), margin)
    rest = order[important:]
    while important < k and len(rest) > k - important:
        a, b = rest[0::2], rest[1::2]
        score = {i: max(cos(space[i], space[j]) for j in b) for i in a}
        drop = min(step, len(rest) - (k - important), len(a))
        rest = ranked(score, a, margin)[drop:] + b
    return sorted(order[:important] + rest[: k - important])


def visionzip(features, saliency, keys, cls_row, k, margin, share):
    n, contextual = len(features), min(k - 1, math.floor(share * k + 0.5))
    patches = k - contextual - (0 if cls_row is None else 1)
    order = ranked(saliency, range(n), margin, patches)
    rest = sorted(order[patches:])
    rows, into = {i: features[i] for i in order[:patches]}, {}
    if contextual:
        centres = rest[:: max(1, len(rest) // contextual)][:contextual]
        for i in rest:
            if i not in centres:
                into[i] = ranked({c: cos(keys[i], keys[c]) for c in centres}, centres, margin, 1)[0]
        for c in centres:
            members = [features[i] for i in into if into[i] == c]
            rows[c] = features[c] + (sum(members) / len(members) if members else 0)
    if cls_row is not None:
        rows[ranked(saliency, [i for i in range(n) if i not in rows], margin, 1)[0]] = cls_row
    return answer(rows, n, into)


def prumerge(features, query, key, k, margin, variant="plus", neighbours=32):
    n = len(features)
    a = softmax([float(query @ row) * len(query) ** -0.5 for row in key])[-n:]
    key = key[-n:]
    order = ranked(np.log(a), range(n), margin, k - 1)
    centres = order[: k - 1]
    if variant == "plus":
        first, third = np.percentile(a, (25, 75))
        bound = third + 1.5 * (third - first)
        margin += [abs(value - bound) for value in a]
        outliers = [i for i in order if a[i] > bound]
        centres, wanted = outliers[: k - 1], k - 1 - len(outliers)
        if wanted > 0:
            rasters = {s: [i for i in range(0, n - 1, s) if i not in outliers] for s in range(1, n)}
            authors = max(1, int(int(n / len(outliers)) / 3)) if outliers else 0
            if authors and len(rasters[authors]) == wanted:
                centres = outliers + rasters[authors]
            else:
                raster = rasters[max(s for s in rasters if len(rasters[s]) >= wanted)]
                centres = outliers + ranked(np.log(a), raster, margin, wanted)[:wanted]
    rows = {}
    for c in centres:
        others = [i for i in range(n) if i != c]
        near = ranked({i: cos(key[c], key[i]) for i in others}, others, margin, neighbours)[
            :neighbours
        ]
        rows[c] = features[c] + sum(a[i] * features[i] for i in near)
    free = [i for i in range(n) if i not in centres]
    place = ranked(np.log(a), free, margin, 1)[0]
    rows[place] = sum(a[i] * features[i] for i in free)
    return answer(rows, n, dict.fromkeys(free, place))


def vflowopt(features, attention, grid, k, margin, threshold, cell):
    n = len(features)
    received = [sum(attention[q][j] for q in range(n)) / n for j in range(n)]
    mean = sum(received) / n
    margin += [abs(r - threshold * mean) for r in received]
    important = [j for j in range(n) if received[j] > threshold * mean] or ranked(
        received, range(n), margin, 1
    )[:1]
    score = [sum(attention[q][i] for q in important) / len(important) for i in range(n)]
    order = ranked(score, range(n), margin)
    for m in range(
        k + 1
    ):  # the first number of kept tokens that makes K rows; with none kept there may be too many
        cells: dict[tuple[int, int], list[int]] = {}
        for i in order[m:]:
            cells.setdefault((int(i // grid[1] / cell), int(i % grid[1] / cell)), []).append(i)
        if m + len(cells) >= k:
            break
    rows, into = {i: features[i] for i in order[:m]}, {}
    for members in list(cells.values())[: k - m]:  # in the order of their best tokens
        total = sum(score[i] for i in members)
        rows[members[0]] = sum(score[i] / total * features[i] for i in members)
        into.update(dict.fromkeys(members, members[0]))
    return answer(rows, n, into)


def quota(frame_weights, saliency, n, k, margin, power=1.0):
    frames = len(frame_weights)
    members = [[i for i in range(n) if i * frames // n == f] for f in range(frames)]
    count = [0] * frames
    for _ in range(k):
        worth = [max(w, 0) ** power / (c + 1) for w, c in zip(frame_weights, count, strict=True)]
        open_frames = [f for f in range(frames) if count[f] < len(members[f])]
        order = sorted(open_frames, key=lambda f: (-worth[f], count[f], f))
        margin += [
            gap for gap in [worth[order[0]] - worth[f] for f in order[1:2]] if gap > 0
        ]  # 0: a tie
        count[order[0]] += 1
    kept = []
    for c, own in zip(count, members, strict=True):
        if saliency is None:
            kept += [own[math.floor((i + 0.5) * len(own) / c)] for i in range(c)]
        else:
            kept += ranked(saliency, own, margin, c)[:c]
    return sorted(kept)


def fastv(probe, k, margin):
    return sorted(ranked(probe, range(len(probe)), margin, k)[:k])


def sparsevlm(features, text, probe, k, margin):
    fit = sum(softmax([float(v @ t) for t in text]) for v in features) / len(features)
    margin += [abs(f - fit.mean()) for f in fit] if len(text) > 1 else []
    raters = [t for t in range(len(text)) if len(text) > 1 and fit[t] > fit.mean()] or list(
        range(len(text))
    )
    score = [sum(row[t] for t in raters) / len(raters) for row in probe]
    return sorted(ranked(score, range(len(probe)), margin, k)[:k])


def dart(features, probe, text, k, margin, image_pivots=4, text_pivots=4):
    norm = [sum(abs(x) for x in row) for row in probe]
    kept = ranked(norm, range(len(probe)), margin)[: min(k, image_pivots)]
    pivots = [features[i] for i in kept]
    if text is not None:
        norm = [sum(abs(x) for x in row) for row in text]
        pivots += [text[t] for t in ranked(norm, range(len(text)), margin)[:text_pivots]]
    share = (k - len(kept)) // len(pivots)
    turns = [(pivot, share) for pivot in pivots] + [(pivot, 1) for pivot in pivots]
    for pivot, count in turns:
        rest = [i for i in range(len(features)) if i not in kept]
        count = min(count, k - len(kept))
        kept = (
            kept + ranked({i: -cos(features[i], pivot) for i in rest}, rest, margin, count)[:count]
        )
    return sorted(kept)


def ivc(
    probe,
    grid,
    k,
    margin,
    seed_share=0.01,
    position_share=0.1,
    positions="raster",
    first=35,
    base=1e4,
    dim=128,
):
    n, text = len(probe), range(len(probe), probe.shape[1])
    count = max(1, round(seed_share * n))
    seeds = ranked(
        [sum(row[t] for t in text) / len(text) for row in probe], range(n), margin, count
    )[:count]
    queries = [*seeds, *text]
    score = [sum(row[q] for q in queries) / len(queries) for row in probe]

    def turn(wave, i):  # equal for mirrored places of a grid, whichever axis comes first
        axes = (
            [first + i]
            if positions == "raster"
            else sorted([first + i // grid[1], first + i % grid[1]])
        )
        return np.float32(
            sum(sum(wave(p / base ** (2 * f / dim)) for f in range(dim // 2)) for p in axes)
        )

    placed: set[int] = set()
    for wave in (math.cos, math.sin):
        telling = {i: turn(wave, i) for i in range(n)}
        placed |= set(sorted(telling, key=lambda i: (-telling[i], i))[: round(position_share * k)])
    kept: list[
        int
    ] = []  # seeds whatever happens, then positions, then the best: as far as K reaches
    for group in (seeds, placed - {*seeds}, {*range(n)} - placed - {*seeds}):
        wanted = k - len(kept)
        kept += ranked(score, sorted(group), margin, wanted)[:wanted] if wanted > 0 else []
    return sorted(kept)
