"""The benchmark of methods runs, and its baselines choose what the methods do; how fast anything
is, is not tested.
"""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import methods as benchmark
from benchmarks import worstcase
from benchmarks.baselines import cdpruner_steps, fsr_literal, similarity_gemm, unit_rows
from benchmarks.cells import FSR, FSR_RANDOM, GEMM, LITERAL, STEPS, Bench, Result
from benchmarks.inputs import Cell, Images
from benchmarks.targets import judged
from benchmarks.timing import Timing, measure
from fsr_vllm.methods import get_method, list_methods
from fsr_vllm.methods.ops import cosine_similarity

TINY = [
    "--device",
    "cpu",
    "--tokens",
    "48",
    "--keep",
    "8",
    "64",
    "--dims",
    "16",
    "24",
    "--batches",
    "1",
    "2",
]


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine the threads of torch wait for each other, and tiny runs then take seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def images():
    return Images.draw(Cell(60, 20, 32, 2), "cpu", torch.float32)


def test_quick_mode_writes_its_report(tmp_path, capsys):
    no_limits = ["--cell-seconds", "500", "--total-seconds", "500"]
    assert (
        benchmark.main(["--quick", "--repeats", "3", *TINY, *no_limits, "--out", str(tmp_path)])
        == 0
    )
    data = json.loads((tmp_path / "methods-cpu.json").read_text())
    assert data["command"].startswith("python -m benchmarks.methods --quick ")
    assert {"date", "CPU", "cores", "torch threads", "torch", "dtype of the features"} <= set(
        data["machine"]
    )
    assert not data["skipped"]

    rows = data["results"]
    assert {(row["cell"]["k"], row["cell"]["d"], row["cell"]["batch"]) for row in rows} == {
        (8, d, batch)
        for d in (16, 24)
        for batch in (1, 2)  # K = 64 of 48 tokens is left out
    }
    of_one = [row for row in rows if row["cell"] == {"n": 48, "k": 8, "d": 16, "batch": 2}]
    names = {row["name"] for row in of_one}
    assert {GEMM, LITERAL, STEPS, FSR, FSR_RANDOM} | (set(list_methods()) - {"fsr"}) <= names
    assert {"farthest, reference", "dpp, masked", "coverage, CPU"} <= names
    assert all(row["timing"]["median"] > 0 and row["timing"]["runs"] >= 3 for row in rows)
    assert next(row["note"] for row in of_one if row["name"] == FSR) == "K_F 2, 6 scanned"
    kernels = {row["cell"]["d"] for row in rows if row["kind"] == "kernel"}
    assert kernels == {16}  # what does not depend on D is measured once

    text = (tmp_path / "methods-cpu.md").read_text()
    assert "### 48 -> 8, D = 24, batch 2" in text and f"| {FSR} |" in text
    printed = capsys.readouterr().out
    assert printed.count("not measured") == 7 and "methods-cpu.md" in printed


def test_what_the_limits_leave_out_is_listed(tmp_path):
    options = ["--total-seconds", "1e-9", "--out", str(tmp_path), "--methods", "random", *TINY]
    assert benchmark.main(options) == 0
    assert "## Not measured for want of time" in (tmp_path / "methods-cpu.md").read_text()
    bench = Bench("cpu", torch.float32, ("fsr", "random"), repeats=3, cell_seconds=1e-9)
    bench.run(Cell(48, 8, 16, 1), with_kernels=True)
    assert [what for _, what in bench.skipped] == ["random"]
    bench.run(Cell(96, 8, 16, 1), with_kernels=True)  # now it is known what the first part takes
    assert bench.skipped[-1] == (Cell(96, 8, 16, 1), "everything")


def test_a_method_that_cannot_run_is_reported_with_the_reason(tmp_path, monkeypatch):
    def refuse(self, tokens, k):
        raise ValueError("not at this size")

    monkeypatch.setattr(type(get_method("uniform")), "select", refuse)
    sizes = ["--tokens", "48", "--keep", "8", "--dims", "16", "--batches", "1"]
    options = [
        "--device",
        "cpu",
        "--repeats",
        "3",
        *sizes,
        "--methods",
        "uniform",
        "random",
        "--out",
        str(tmp_path),
    ]
    assert benchmark.main(options) == 0
    assert (
        "48 -> 8, D = 16, batch 1: uniform: not at this size"
        in (tmp_path / "methods-cpu.md").read_text()
    )
    data = json.loads((tmp_path / "methods-cpu.json").read_text())
    assert [entry["what"] for entry in data["failed"]] == ["uniform"]
    assert "random" in {row["name"] for row in data["results"]}


@pytest.mark.parametrize(
    "wrong", [["--methods", "nope"], ["--repeats", "0"], ["--keep", "0"], ["--threads", "0"]]
)
def test_wrong_arguments(wrong):
    with pytest.raises(SystemExit):
        benchmark.main(wrong)


@pytest.mark.parametrize("k", [1, 4, 7, 20, 57])
def test_the_literal_loop_is_fsr(images, k):
    images = Images(Cell(60, k, 32, 2), images.features, images.generator)
    tokens = images.weighted()
    pruned = get_method("fsr").prune(tokens, k)
    assert pruned.k_focus.tolist() == [max(1, k // 4)] * 2
    rows, indices = fsr_literal(tokens.features, tokens.saliency, tokens.relevance, k)
    assert torch.equal(indices, pruned.indices)
    torch.testing.assert_close(rows, pruned.tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_other_loop_is_cdpruner(images, k):
    tokens = images.tokens(get_method("cdpruner"))
    tokens.group = None  # each image by itself
    rows, indices = cdpruner_steps(tokens.features, tokens.relevance, k)
    pruned = get_method("cdpruner").prune(tokens, k)
    assert torch.equal(indices, pruned.indices) and torch.equal(rows, pruned.tokens)


def test_the_gemm_is_the_one_behind_the_cosines(images):
    torch.testing.assert_close(
        similarity_gemm(unit_rows(images.features)), cosine_similarity(images.features)
    )


@pytest.mark.parametrize("n, k", [(576, 64), (576, 320), (2880, 64), (2880, 640), (13, 12)])
def test_focus_ends_at_a_quarter_at_every_size(n, k):
    tokens = Images.draw(Cell(n, k, 4, 1), "cpu", torch.float32).weighted()
    assert get_method("fsr", scan="farthest").prune(tokens, k).k_focus.tolist() == [max(1, k // 4)]


def test_calls_are_repeated_in_turns():
    seen = []
    timings = measure(
        {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")},
        "cpu",
        repeats=4,
        seconds=9.0,
    )
    assert seen == ["a", "a", "b", "b"] + ["a", "b"] * 4  # warm first
    assert [timing.runs for timing in timings.values()] == [4, 4]
    assert measure({"a": lambda: None}, "cpu", repeats=9, seconds=0.0)["a"].runs == 3


def test_verdicts():
    def row(name, ms, cell, literal=1.0):
        return Result(cell, "method", name, Timing(ms, ms, ms, ms, 3), {LITERAL: literal})

    cell, larger = Cell(576, 64, 1024, 1), Cell(576, 64, 4096, 1)
    results = [
        row(FSR, 0.2, cell, 0.1),
        row(FSR, 0.3, larger, 0.5),
        row(STEPS, 4, cell),
        row(STEPS, 5, larger),
    ]
    words = [verdict.word for verdict in judged("cuda", results)]
    assert (
        words
        == ["missed", "not measured", "not measured", "met"]
        + ["not measured", "reported"]
        + ["not measured"] * 2
    )
    results = [row(FSR, 16.9, cell, 0.25), row(GEMM, 10.0, cell)]
    near, literal = judged("cpu", results)[-2:]
    assert near.word == "met" and near.found == "16.90 ms, limit 1.5 * 10.00 + 2 = 17.00 ms"
    assert literal.found == "4.0 to 4.0 over 1 combinations of sizes"
    assert "cpu   met           FSR" in str(near)


def test_worst_cases_cover_every_option_and_judge_it(tmp_path, capsys):
    options = [
        "--tokens",
        "40",
        "160",
        "--methods",
        "fsr",
        "vispruner",
        "fastv",
        "random",
        "--repeats",
        "1",
    ]
    status = worstcase.main([*options, "--out", str(tmp_path)])
    data = json.loads((tmp_path / "worst-case-cpu.json").read_text())
    rows = {(row["method"], row["options"]): row for row in data["rows"]}
    assert all(set(row["at"]) == {"40", "160"} for row in rows.values())
    for name in ("fsr", "vispruner", "fastv", "random"):
        assert (name, "no options") in rows
        for item in list_methods()[name].options:
            assert any(item + "=" in options for method, options in rows if method == name), (
                name,
                item,
            )
    assert rows["fastv", "no options"]["requests"] == "not served: inputs"
    bounded = rows["vispruner", "step=1"]
    assert bounded["requests"] == "refused to requests" and bounded["estimated"]
    assert rows["vispruner", "step=3"]["requests"] != "refused to requests"
    dear = {row["requests"] for row in rows.values() if row["requests"].startswith("SERVED")}
    assert status == int(bool(dear))
    assert rows["fsr", "no options"]["at"]["160"]["share"] == 1.0
    assert "| `vispruner` | step=1 | " in (tmp_path / "worst-case-cpu.md").read_text()
