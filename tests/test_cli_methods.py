"""`fsr-vllm methods` as a user reads it."""

from __future__ import annotations

import json

import pytest

from fsr_vllm.cli import main
from fsr_vllm.methods import list_methods


def test_the_table_fits_a_hundred_columns_one_line_a_method(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    head = next(line for line in lines if "method" in line)
    assert head.split() == [
        "method",
        "served?",
        "question?",
        "fidelity",
        "arXiv",
        "needs",
        "(uses)",
    ]
    rows = {
        line.split()[0]: line.split()
        for line in lines
        if line.split()[:1] and line.split()[0] in list_methods()
    }
    assert list(rows) == list(list_methods())
    assert rows["fsr"][1:5] == ["yes", "yes", "exact", "2602.05809"] and rows["fastv"][1:4] == [
        "no",
        "yes",
        "input-probe",
    ]
    assert rows["hiprune"][5:] == ["received,", "shallow_received", "(grid)"] and rows["none"][
        4:
    ] == ["-", "-"]


def test_one_method_with_everything_about_it(capsys):
    assert main(["methods", "vispruner"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    info = list_methods()["vispruner"]
    assert info.paper in told and info.license in told and "saliency" in told and "metric" in told
    assert (
        "at least N / 72" in told
        and "share of K chosen by saliency" in told
        and "ratio 0.5 any" in told
    )
    assert main(["methods", "none"]) == 0
    assert "No options." in capsys.readouterr().out


@pytest.mark.parametrize("name", list_methods())
def test_every_method_can_be_told(name, capsys):
    assert main(["methods", name]) == 0
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines())


def test_json_is_what_python_says(capsys):
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == list(list_methods())
    assert main(["methods", "scope", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one == next(entry for entry in listed if entry["name"] == "scope")
    assert one["options"]["combine"] == "product" and one["servable"] is True


def test_a_name_that_is_no_method(capsys):
    assert main(["methods", "hiprun"]) == 2
    assert "unknown method 'hiprun'; did you mean hiprune?" in capsys.readouterr().err
    assert main(["methods", "zzz"]) == 2
    assert "there are fsr, cdpruner" in capsys.readouterr().err
