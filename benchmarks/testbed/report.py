"""The evaluation as a Markdown table and a plot; several of them, of models of other training
seeds, as one table:

python -m benchmarks.testbed.report accuracy.json accuracy-1.json accuracy-2.json > seeds.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .questions import FAMILIES
from .scenes import PATCHES

_SHOWN_LINES = 12  # of the plot: more cannot be told apart


def markdown(report: dict[str, Any]) -> str:
    """Tables by budget, best mean first; per cent right, differences in points with their 95 %
    interval.
    """
    full, families = report["full"], report["admitted"]
    left_out = [family for family in FAMILIES if family not in families]
    excluded = (
        f" ({', '.join(left_out)} do not clearly beat their majority answer)" if left_out else ""
    )
    lines = [
        "# Accuracy on the testbed", "",
        f"`{report['command']}`: {report['questions_per_family']:,} questions per family of the "
        f"{report['split']} "
        f"split, the same for every row; {report['seconds']} s.{_again(report)} Per cent right; "
        "*mean* is over the "
        f"families {', '.join(families)}{excluded}, ± is its standard error over scenes, "
        "differences are paired, with "
        "95 % intervals. *tuned*: the best of equally many tries per method on the validation "
        "split "
        "([tuning.json](tuning.json)); what FSR's tries are drawn from was narrowed by hand on "
        "earlier models of this "
        "testbed, which no rival had. Other rows are the published defaults. *K_F/K*: focus "
        "tokens wanted, before "
        "clamping. The model is small, synthetic, of one training seed: rankings here say little "
        "about large models. "
        "Things stand in 16 cells of 3 x 3 patches, and `uniform` at 16 tokens takes one patch "
        "of each: there it is "
        "no fair rival. The oracle keeps what is asked about first: it cannot see a second thing "
        "to count.",
        "",
    ]  # fmt: skip
    head = ["tokens", "mean", *FAMILIES]
    lines += _table(head, [
        ["all " + str(PATCHES), f"{full['mean']:.1f} ± {full['standard_error']:.1f}",
         *(f"{full['families'][f]:.1f}" for f in FAMILIES)],
        ["majority answer", "", *(f"{report['majority'][f]:.1f}" for f in FAMILIES)],
    ])  # fmt: skip
    against = sorted({key for row in report["rows"] for key in row if key.startswith("against ")})
    for budget in dict.fromkeys(row["budget"] for row in report["rows"]):
        rows = sorted(
            (row for row in report["rows"] if row["budget"] == budget), key=lambda row: -row["mean"]
        )
        lines += ["", f"## {budget} of {PATCHES} tokens ({100 * budget / PATCHES:.0f} %)", ""]
        head = [
            "row",
            "mean",
            *FAMILIES,
            *(key.replace("against", "−") for key in against),
            "K_F/K",
        ]
        lines += _table(head, [
            [
                row["label"], f"{row['mean']:.1f} ± {row['standard_error']:.1f}",
                *(f"{row['families'][f]:.1f}" if f in row["families"] else "" for f in FAMILIES),
                *(_difference(row.get(key)) for key in against),
                f"{row['focus_share']:.2f}" if row["method"] == "fsr" else "",
            ]
            for row in rows
        ])  # fmt: skip
    options = [
        row
        for row in report["rows"]
        if row["options"] and row["budget"] == report["rows"][0]["budget"]
    ]
    lines += [
        "",
        "## Options",
        "",
        *_table(["row", "options"], [[r["label"], f"`{r['options']}`"] for r in options]),
    ]
    return "\n".join(lines) + "\n"


def _again(report: dict[str, Any]) -> str:
    """What was run later, after methods had been corrected."""
    commands = " and ".join(f"`{command}`" for command in report.get("again", []))
    return f" Rows of corrected methods were run anew by {commands}." if commands else ""


def seeds_markdown(reports: Sequence[dict[str, Any]], mine: str = "fsr (served)") -> str:
    """Rows that all reports have: their mean in each, the mean of those, and how far `mine` is
    ahead of them.
    """
    shared = [{(row["label"], row["budget"]): row for row in report["rows"]} for report in reports]
    keys = [key for key in shared[0] if all(key in rows for rows in shared)]
    full = [report["full"]["mean"] for report in reports]
    lines = [
        "# Accuracy on the testbed, by training seed", "",
        f"The same questions to {len(reports)} models that were trained from different seeds; "
        "means over the admitted "
        f"families of each ({'; '.join(', '.join(report['admitted']) for report in reports)}), "
        "per cent right. Tuned "
        f"on the first model alone. *ahead*: {mine} minus the row, model by model. All tokens: "
        f"{', '.join(f'{value:.1f}' for value in full)}.",
    ]  # fmt: skip
    for budget in dict.fromkeys(budget for _, budget in keys):
        found = {
            label: [rows[label, budget]["mean"] for rows in shared]
            for label, b in keys
            if b == budget
        }
        head = [
            "row",
            *(f"model {number}" for number in range(1, len(reports) + 1)),
            "mean",
            "ahead",
        ]
        table = [
            [label, *(f"{value:.1f}" for value in values), f"{fmean(values):.1f}",
             ", ".join(f"{a - b:+.1f}" for a, b in zip(found[mine], values, strict=True))]
            for label, values in sorted(found.items(), key=lambda item: -fmean(item[1]))
        ]  # fmt: skip
        lines += ["", f"## {budget} of {PATCHES} tokens", "", *_table(head, table)]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], file: Path) -> None:
    """Accuracy against tokens kept, one line per row; the best ones and the references have names.
    Needs matplotlib.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fsr"  # the same figure, the same bytes
    from matplotlib import pyplot

    by_label: dict[str, list[tuple[int, float]]] = {}
    for row in report["rows"]:
        by_label.setdefault(row["label"], []).append((row["budget"], row["mean"]))
    everything = (PATCHES, report["full"]["mean"])
    order = sorted(by_label, key=lambda label: -sum(value for _, value in by_label[label]))
    named = [
        *order[:_SHOWN_LINES],
        *(label for label in ("fsr", "cdpruner", "random") if label in order[_SHOWN_LINES:]),
    ]
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for label in order:
        points = [*sorted(by_label[label]), everything]
        mine = label.startswith("fsr")
        style: dict[str, Any] = {
            "linewidth": 2.4 if mine else 1.2,
            "marker": "o",
            "markersize": 3,
            "zorder": 3 if mine else 2,
        }
        if label not in named:
            style |= {"color": "0.85", "zorder": 1}
        elif label in ("oracle", "random"):
            style |= {"color": "black", "linestyle": "--" if label == "oracle" else ":"}
        axes.plot(*zip(*points, strict=True), label=label if label in named else None, **style)
    axes.set(
        xlabel=f"visual tokens kept, of {PATCHES}", ylabel="per cent right, mean over families"
    )
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _difference(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    return f"{value['difference']:+.1f} [{value['low']:+.1f}, {value['high']:+.1f}]"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    print(seeds_markdown([json.loads(Path(name).read_text()) for name in sys.argv[1:]]), end="")
