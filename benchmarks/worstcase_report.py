"""The table of benchmarks.worstcase."""

from __future__ import annotations

from typing import Any

LIMIT = 4.0  # times served FSR, above which an option is not served
HEADS, WIDTH = 16, 1024  # of the tower whose attention is formed again
LAYERS = {
    "hiprune": {"received": 2},
    "vflowopt": {"attention": 1},
}  # signals that cost more than one row of queries


def worst_of_reference(report: dict[str, Any]) -> float:
    """Seconds of FSR as served at the largest size."""
    return report["rows"][0]["at"][str(report["sizes"][-1])]["seconds"]


def markdown(report: dict[str, Any]) -> str:
    sizes = report["sizes"]
    lines = ["# Worst cases of methods and options", ""]
    lines += [
        f"`{report['command']}`, {report['seconds']} s; D = 1024, one image, float32, one "
        "thread. Medians of CPU"
    ]
    lines += ["time, run in turns."]
    lines += [
        "Budgets are those that take longest of 64, N / 2 and N - 1 tokens kept; *x FSR* is the "
        "multiple of the"
    ]
    lines += [
        "worst case of FSR as served at the same size, in the same run. Served up to x "
        f"{LIMIT:g} at {sizes[-1]:,}."
    ]
    lines += ["", ", ".join(f"{key}: {value}" for key, value in report["machine"].items()), ""]
    head = [
        "method",
        "options",
        *(f"{n:,}: K, s" for n in sizes),
        *(f"{n:,}: x FSR" for n in sizes),
        "requests",
    ]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in report["rows"]:
        about = "~" if row["estimated"] else ""
        times = [
            f"{at['budget']}, {about if n == str(sizes[-1]) else ''}{at['seconds']:.3g}"
            for n, at in row["at"].items()
        ]
        shares = [
            f"{about if n == str(sizes[-1]) else ''}{at['share']:.2g}"
            for n, at in row["at"].items()
        ]
        lines.append(
            "| "
            + " | ".join([f"`{row['method']}`", row["options"], *times, *shares, row["requests"]])
            + " |"
        )
    lines += ["", "`~`: not run, from the smaller size by the cube of N.", "", "## Signals", ""]
    lines += [
        f"Seconds for one layer of {HEADS} heads. They are formed once per image, beside a "
        "tower that computes the"
    ]
    lines += ["same attention in every layer."]
    last, worst = str(sizes[-1]), {row["method"]: 0.0 for row in report["rows"]}
    for row in report["rows"]:
        worst[row["method"]] = max(worst[row["method"]], row["at"][last]["seconds"])
    for name, layers in LAYERS.items():
        if name in worst:
            total = worst[name] + sum(
                number * report["signals"][last][signal] for signal, number in layers.items()
            )
            lines += [
                f"With what it needs, `{name}` costs x {total / worst_of_reference(report):.2g} "
                f"at {sizes[-1]:,}."
            ]
    lines += [""]
    lines += [
        "| signal | " + " | ".join(f"{n:,}" for n in sizes) + " |",
        "|" + "---|" * (1 + len(sizes)),
    ]
    for name in report["signals"][str(sizes[0])]:
        lines.append(
            f"| `{name}` | "
            + " | ".join(f"{report['signals'][str(n)][name]:.3g}" for n in sizes)
            + " |"
        )
    return "\n".join(lines) + "\n"
