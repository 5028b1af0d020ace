"""docs/methods.md says of every method what the registry says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fsr_vllm.methods import SERVED_DEFAULTS, list_methods

DOC = Path(__file__).resolve().parents[2] / "docs" / "methods.md"


def table(*header: str) -> list[dict[str, str]]:
    """The rows, by column, of the one table whose header starts with these columns."""
    blocks = re.findall(r"(?:^\|.*\n)+", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    rows = [
        [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()]
        for block in blocks
    ]
    [(columns, rule, *body)] = [block for block in rows if tuple(block[0][: len(header)]) == header]
    assert set("".join(rule)) == {"-"}
    return [dict(zip(columns, cells, strict=True)) for cells in body]


METHOD_ROWS = table("name", "idea")


def names(text: str) -> list[str]:
    return [name for name in re.split(r"[,\s]+", text) if name not in ("", "-")]


def test_every_method_has_one_row_in_order():
    assert [row["name"] for row in METHOD_ROWS] == [f"`{name}`" for name in list_methods()]


@pytest.mark.parametrize("row", METHOD_ROWS, ids=[row["name"].strip("`") for row in METHOD_ROWS])
def test_a_row_says_what_the_registry_says(row):
    info = list_methods()[row["name"].strip("`")]
    needs, _, uses = row["needs"].partition("(")
    assert (names(needs), names(uses.rstrip(")"))) == (list(info.needs), list(info.uses))
    assert row["query-aware"] == ("yes" if info.query_aware else "no")
    assert row["served"] == ("yes" if info.servable else "no")
    assert row["fidelity"] == info.fidelity
    assert all(row.values())


def test_the_options_of_fsr():
    def column(name: str) -> dict[str, object]:
        return {
            row["option"].strip("`"): json.loads(row[name].strip("`"))
            for row in table("option", "paper", "served")
            if row[name]
        }

    assert column("paper") == dict(list_methods()["fsr"].options)
    assert column("served") == SERVED_DEFAULTS["fsr"]
