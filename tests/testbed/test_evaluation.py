"""The evaluation's arithmetic and reports, on numbers that are known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.testbed import stats, tune
from benchmarks.testbed.evaluate import merged, rows
from benchmarks.testbed.report import markdown, plot, seeds_markdown
from fsr_vllm.methods import get_method, list_methods


def outcome(right):
    return SimpleNamespace(right=np.asarray(right, bool))


def test_macro_mean_weighs_families_equally():
    families = np.array(["a"] * 2 + ["b"] * 6)
    right = np.array([1, 0, 1, 1, 1, 1, 1, 1], bool)
    assert stats.macro(right, families, ["a", "b"]) == pytest.approx(0.75)
    assert stats.macro(right, families, ["a"]) == pytest.approx(0.5)


def test_families_that_guessing_would_do_as_well_are_left_out():
    right = {"known": 0.9, "barely": 0.62, "guessed": 0.5}
    assert stats.admitted(right, {"known": 0.5, "barely": 0.5, "guessed": 0.5}, 1000) == ["known"]
    assert (
        stats.admitted({"few": 0.75}, {"few": 0.5}, 10) == []
    )  # ten questions are not enough to be sure


def test_paired_differences_are_surer_than_unpaired_ones():
    random = np.random.default_rng(0)
    families, scenes = np.array(["a", "b"] * 500), np.repeat(np.arange(250), 4)
    easy = random.random(1000) < 0.5
    better = easy | (random.random(1000) < 0.1)
    result = stats.compare(outcome(better), outcome(easy), families, scenes, ["a", "b"])
    assert result["low"] < result["difference"] < result["high"] and result["low"] > 0
    assert result["difference"] == pytest.approx(100 * (better.mean() - easy.mean()))
    single = 100 * stats.standard_error(easy, families, scenes, ["a", "b"])
    assert result["standard_error"] < single
    assert single == pytest.approx(
        100 * (0.25 / 1000) ** 0.5, rel=0.2
    )  # questions here are independent


def test_questions_about_one_scene_are_not_counted_as_independent():
    scenes = np.repeat(np.arange(50), 20)
    right = np.repeat(np.random.default_rng(1).random(50) < 0.5, 20)
    error = stats.standard_error(right, np.array(["a"] * 1000), scenes, ["a"])
    assert error == pytest.approx((0.25 / 50) ** 0.5, rel=0.25)


def test_no_difference_is_within_its_interval():
    same = outcome(np.ones(40))
    result = stats.compare(same, same, np.array(["a"] * 40), np.arange(40), ["a"])
    assert result["difference"] == result["low"] == result["high"] == 0


@pytest.mark.parametrize("method", list(tune.SPACE))
def test_every_method_gets_the_same_number_of_tries(method):
    found = tune.tries(method)
    size = int(np.prod([len(values) for values in tune.SPACE[method].values()]))
    assert found[0] == {} and found == tune.tries(method)
    assert len(found) == tune.TRIES or (size <= 2 * tune.TRIES and len(found) >= size // 2)
    made = [json.dumps(vars(get_method(method, **options)), sort_keys=True) for options in found]
    assert len(set(made)) == len(made)


def test_every_registered_method_has_a_row():
    lines = rows({"fsr": [{"options": {"alpha": 1.0}}], "scope": [{"options": {}}]})
    labels = [line.label for line in lines]
    assert set(list_methods()) <= set(labels) and len(set(labels)) == len(labels)
    assert "fsr (tuned)" in labels and "scope (tuned)" not in labels
    assert {
        "oracle",
        "fsr (served), generic text",
        "fsr (served), sign flipped",
        "fsr (served), no relevance",
    } <= set(labels)
    assert [line.label for line in rows({}, ["random"])] == ["random"]


def test_reports(tmp_path):
    def row(label, budget, mean, **more):
        values = {
            "attribute": mean,
            "object": mean,
            "existence": mean,
            "digit": mean,
            "scene": mean,
            "count": 50.0,
        }
        values["relation"] = 50.0
        base = {
            "label": label,
            "method": label,
            "options": {},
            "budget": budget,
            "mean": mean,
            "standard_error": 1.0,
        }
        return base | {"families": values, "focus_share": 0.5, "scan": 1.0, "merged": 1.0} | more

    difference = {"difference": 7.0, "low": 5.5, "high": 8.5, "standard_error": 0.7}
    report = {
        "command": "python -m it", "split": "test", "questions_per_family": 1000, "seconds": 3,
        "admitted": ["attribute", "object"], "majority": row("majority", 144, 20.0)["families"],
        "full": row("all tokens", 144, 95.0),
        "rows": [row("random", 16, 50.0), row("fsr", 16, 57.0, **{"against random": difference}),
                 row("random", 32, 60.0), row("fsr", 32, 70.0, **{"against random": difference})],
    }  # fmt: skip
    text = markdown(report)
    assert (
        "`python -m it`" in text
        and "1,000 questions" in text
        and "count, relation do not clearly beat" in text
    )
    best = text.index("| fsr | 57.0 ± 1.0")
    assert best < text.index("| random | 50.0 ± 1.0") and "+7.0 [+5.5, +8.5]" in text
    other = report | {
        "rows": [row("random", 16, 51.0), row("fsr", 16, 60.0), row("scope", 16, 99.0)]
    }
    seeds = seeds_markdown([report, other], mine="fsr")
    assert (
        "| fsr | 57.0 | 60.0 | 58.5 | +0.0, +0.0 |" in seeds
        and "| random | 50.0 | 51.0 | 50.5 | +7.0, +9.0 |" in seeds
    )
    assert "scope" not in seeds and "## 32" not in seeds
    files = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for file in files:
        plot(report, file)
    assert files[0].read_bytes() == files[1].read_bytes() and b"<svg" in files[0].read_bytes()


def test_rows_run_anew_replace_those_of_an_earlier_report():
    def report(command, *rows, full=95.0):
        about = {
            "split": "test",
            "questions_per_family": 9,
            "admitted": ["object"],
            "majority": {},
            "full": full,
        }
        cells = [{"label": label, "budget": budget, "mean": mean} for label, budget, mean in rows]
        return {"command": command, **about, "rows": cells, "seconds": 5}

    old = report(
        "all", ("fsr", 16, 1.0), ("holov", 16, 2.0), ("holov", 32, 3.0), ("holov (tuned)", 16, 4.0)
    )
    new = report("some", ("holov", 32, 6.0), ("holov", 16, 5.0))
    found = merged(old, new, ["fsr", "holov"])
    assert [(row["label"], row["budget"], row["mean"]) for row in found["rows"]] == [
        ("fsr", 16, 1.0), ("holov", 16, 5.0), ("holov", 32, 6.0),
    ]  # fmt: skip
    assert found["command"] == "all" and found["again"] == ["some"] and found["seconds"] == 5
    assert merged(found, new, ["fsr", "holov"])["again"] == ["some"]
    with pytest.raises(ValueError, match="about something else: full"):
        merged(old, report("some", full=94.0), ["fsr"])
