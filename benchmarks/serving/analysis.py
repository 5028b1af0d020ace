"""What paired blocks say: medians, differences to vanilla with intervals, when they are void."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BASE, CONTROL, OFF = "vanilla", "vanilla again", "off"
# Compared with vanilla, in per cent of vanilla's: the key of a block, and its heading.
COMPARED = {
    "ttft_ms": "TTFT",
    "requests_per_second": "requests/s",
    "later_token_ms": "later token",
    "api_cpu_ms": "API server CPU",
}
SHOWN = {
    "prompt_tokens": ("prompt tokens", 0),
    "requests_per_second": ("requests/s", 2),
    "ttft_ms": ("TTFT ms", 1),
    "ttft_p95_ms": ("p95 ms", 1),
    "later_token_ms": ("later token ms", 2),
    "whole_ms": ("whole ms", 0),
    "api_cpu_ms": ("API CPU ms/request", 2),
    "engine_cpu_ms": ("engine CPU ms/request", 2),
}
LATER_LIMIT = 2.0  # per cent that time per later token may differ where no plugin code runs
LEAST_PAIRS = 4  # fewer give no interval
_DRAWS = 4000

Block = dict[str, Any]


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """The bootstrap interval of the median; None where there are too few values to say."""
    if len(values) < LEAST_PAIRS:
        return None
    rng = np.random.default_rng(0)
    drawn = np.asarray(values)[rng.integers(len(values), size=(_DRAWS, len(values)))]
    low, high = np.quantile(np.median(drawn, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def differences(blocks: Iterable[Block], arm: str, concurrency: int, key: str) -> list[float]:
    """Per cent by which `arm` differs from vanilla, a value for each round that has both."""
    rounds: dict[Any, dict[str, float]] = {}
    for block in blocks:
        if block["concurrency"] == concurrency and not block.get("error") and key in block:
            rounds.setdefault((block["run"], block["round"]), {})[block["arm"]] = block[key]
    return [
        100 * (found[arm] / found[BASE] - 1)
        for found in rounds.values()
        if arm in found and found.get(BASE)
    ]


def compare(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """A record for each concurrency, arm and compared figure."""
    records = []
    for concurrency in sorted({block["concurrency"] for block in blocks}):
        for arm in dict.fromkeys(block["arm"] for block in blocks):
            for key in COMPARED if arm != BASE else ():
                values = differences(blocks, arm, concurrency, key)
                if values:
                    records.append(
                        {
                            "concurrency": concurrency,
                            "arm": arm,
                            "figure": key,
                            "pairs": len(values),
                            "percent": statistics.median(values),
                            "interval": interval(values),
                        }
                    )
    return records


def voids(blocks: Sequence[Block]) -> dict[tuple[int, str] | None, str]:
    """Why figures count for nothing: by concurrency and figure, or under None for all of them."""
    found: dict[tuple[int, str] | None, str] = {}
    records = compare(blocks)
    for record in records:
        place, span = (record["concurrency"], record["figure"]), record["interval"]
        if record["arm"] == CONTROL and span and (span[0] > 0 or span[1] < 0):
            found[place] = f"vanilla differs from itself by {span[0]:+.1f} to {span[1]:+.1f} %"
        alone = place == (1, "later_token_ms") and record["arm"] in (CONTROL, OFF)
        if alone and abs(record["percent"]) > LATER_LIMIT:
            found[None] = (
                f"time per later token of {record['arm']} differs by {record['percent']:+.1f} %"
            )
    if not any(record["arm"] == CONTROL and record["interval"] for record in records):
        found[None] = "the control has too few blocks"
    return found | _unpruned(blocks)


def _unpruned(blocks: Sequence[Block]) -> dict[tuple[int, str] | None, str]:
    """All is void where a budget did not shorten the prompt, or "off" did not leave it alone."""
    prompts: dict[str, list[float]] = {}
    for block in blocks:
        if "prompt_tokens" in block:
            prompts.setdefault(block["arm"], []).append(block["prompt_tokens"])
    whole = statistics.median(prompts.get(BASE, [0]))
    for arm, lengths in prompts.items():
        same = abs(statistics.median(lengths) - whole) < 16  # questions differ by a few tokens
        if whole and same != (arm in (BASE, CONTROL, OFF)):
            return {None: f"the prompts of {arm} have {statistics.median(lengths):.0f} tokens"}
    return {}


def markdown(data: dict[str, Any]) -> str:
    """The report; tables of medians and of differences."""
    blocks: list[Block] = data["blocks"]
    about = "\n".join(f"- {name}: {value}" for name, value in data["machine"].items())
    void = voids(blocks) if blocks else {None: "nothing was measured"}
    parts = [f"# Paired serving: {data['settings']['size']}", f"`{data['command']}`", about, _HOW]
    if None in void:
        parts.append(f"**Void: {void[None]}.**")
    parts += ["## Against vanilla, per cent", _differences(blocks, void)]
    places = {place: why for place, why in void.items() if place}
    reasons = [f"- {COMPARED[key]} at {at} at once: {why}." for (at, key), why in places.items()]
    parts += ["(void) in the table:", "\n".join(reasons)] if reasons else []
    parts += ["## Medians of blocks (CPU: means)", _medians(blocks)]
    parts += ["## Embedding, by the worker's clock, one at a time", _embedding(data["embedding"])]
    parts += ["## Servers", _servers(data["servers"])]
    failed = [f"- {b['arm']} at {b['concurrency']}: {b['error']}" for b in blocks if "error" in b]
    parts += ["Blocks that failed:", "\n".join(failed)] if failed else []
    return "\n\n".join(part for part in parts if part) + "\n"


_HOW = """\
All servers are up at once and only one is asked at a time, in blocks; a round is one block of every
arm in shuffled order. Every request has a picture of its own. Differences are medians of
block / vanilla's block of the same round - 1, with the 95 % bootstrap interval of that median and
the number of rounds. "vanilla again" is the control: what it shows is noise. Time per later token
runs no plugin code; it has to be equal for "vanilla again" and "off" at one at a time."""


def _differences(blocks: Sequence[Block], void: dict[Any, str]) -> str:
    cells: dict[tuple[int, str], dict[str, str]] = {}
    for r in compare(blocks):
        low_high = "[{:+.1f}, {:+.1f}]".format(*r["interval"]) if r["interval"] else "[too few]"
        mark = " (void)" if None in void or (r["concurrency"], r["figure"]) in void else ""
        text = f"{r['percent']:+.1f} {low_high}{mark}"
        row = cells.setdefault((r["concurrency"], r["arm"]), {"rounds": str(r["pairs"])})
        row[r["figure"]] = text
    head = ["at once", "arm", "rounds", *COMPARED.values()]
    keys = ["rounds", *COMPARED]
    return table(head, ([*place, *(row.get(k, "-") for k in keys)] for place, row in cells.items()))


def _medians(blocks: Sequence[Block]) -> str:
    rows = []
    for concurrency in sorted({block["concurrency"] for block in blocks}):
        for arm in dict.fromkeys(block["arm"] for block in blocks):
            mine = [b for b in blocks if (b["arm"], b["concurrency"]) == (arm, concurrency)]
            mine = [block for block in mine if not block.get("error")]
            row: list[Any] = [concurrency, arm, len(mine), sum(b["requests"] for b in mine)]
            for key, (_, digits) in SHOWN.items():
                values = [block[key] for block in mine if key in block]
                # The CPU's clock ticks 100 times a second: only sums of many blocks are exact.
                middle = statistics.mean if key.endswith("cpu_ms") else statistics.median
                row.append(f"{middle(values):.{digits}f}" if values else "-")
            rows.append(row)
    heads = [name for name, _ in SHOWN.values()]
    return table(["at once", "arm", "blocks", "requests", *heads], rows)


def _embedding(arms: dict[str, dict[str, float]]) -> str:
    keys = {"tower_ms_per_image": "tower ms/image", "select_ms_per_image": "select ms/image"}
    rows = ([arm, *(f"{found[key]:.2f}" for key in keys)] for arm, found in arms.items() if found)
    return table(["arm", *keys.values()], rows)


def _servers(servers: dict[str, Any]) -> str:
    lines = []
    for name, server in servers.items():
        said = "; ".join(f"{key}: {value}" for key, value in server.get("log", {}).items())
        state = server.get("error", "").partition("\n")[0] or f"up after {server['seconds']} s"
        lines.append(f"- {name}: {state}; `{' '.join(server['options'])}`; {said}")
    return "\n".join(lines)


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def save(data: dict[str, Any], path: Path) -> None:
    """Write the data, a block per line, and the report beside it; the data is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({**data, "blocks": []}, indent=1)
    blocks = ",\n  ".join(json.dumps(block) for block in data["blocks"])
    new = path.with_suffix(".new")
    new.write_text(head.replace('"blocks": []', f'"blocks": [\n  {blocks}\n ]') + "\n", "utf-8")
    new.replace(path)
    path.with_suffix(".md").write_text(markdown(data), encoding="utf-8")
