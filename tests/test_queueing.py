"""The simulated server of the benchmark: nothing gets lost in it, and the adaptive budget does in
it what it is for.
"""

import json

import pytest

from benchmarks import adaptive as benchmark
from benchmarks.adaptive import capacity, figures
from benchmarks.queueing import Setup, Times, poisson, simulate

TIMES = Times(
    prepare=0.01,
    step=0.04,
    encode=0.08,
    prefill_per_token=0.004,
    decode_step=0.08,
    decode_per_sequence=0.004,
)
SETUP = Setup(TIMES)
BOUNDS = (64, 288)


def test_one_request_alone_takes_the_sum_of_its_parts():
    (request,) = simulate([5.0], SETUP, (288, 288)).requests
    first = 0.01 + 0.04 + 0.08 + 0.004 * (288 + SETUP.text_tokens)
    assert request.first_token - 5.0 == pytest.approx(first)
    assert request.done - request.first_token == pytest.approx((SETUP.output_tokens - 1) * 0.084)
    assert request.budget == 288


@pytest.mark.parametrize(
    "setup",
    [SETUP, Setup(TIMES, sequences=2), Setup(TIMES, kv_tokens=700), Setup(TIMES, step_tokens=100)],
)
def test_every_request_is_served_once_and_in_order(setup):
    arrivals = poisson(((60.0, 1.0),), 3)
    requests = simulate(arrivals, setup, BOUNDS).requests
    assert [request.arrived for request in requests] == arrivals
    assert all(
        r.arrived + 0.01 < r.first_token < r.done and r.to_prefill == r.to_decode == 0
        for r in requests
    )
    firsts = [request.first_token for request in requests]
    assert firsts == sorted(firsts)


def test_arrivals_come_at_their_rates():
    times = poisson(((1000.0, 1.0), (1000.0, 3.0)), 1)
    assert (
        times == sorted(times)
        and 900 < sum(t < 1000 for t in times) < 1100
        and 2800 < sum(t > 1000 for t in times) < 3200
    )


def test_adaptive_is_high_at_rest_and_serves_sooner_under_load():
    rate = capacity(SETUP, 288)
    assert capacity(SETUP, 64) > 2 * rate
    rest = simulate(poisson(((300.0, 0.2 * rate),), 1), SETUP, BOUNDS)
    assert {request.budget for request in rest.requests} == {288} and not rest.changes
    arrivals = poisson(((100.0, 3 * rate),), 1)
    fixed, adaptive = (
        figures(simulate(arrivals, SETUP, bounds), 100.0, 10.0, 288)
        for bounds in ((288, 288), BOUNDS)
    )
    assert adaptive["ttft_p95"] < 0.5 * fixed["ttft_p95"] and adaptive["goodput"] > fixed["goodput"]
    assert adaptive["mean_budget"] < 120 and adaptive["switches_per_100_requests"] < 10


def test_the_report_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SEEDS", (1,))
    monkeypatch.setattr(benchmark, "LOADS", {"0.5x": ((30.0, 0.5),)})
    monkeypatch.setattr(benchmark, "RULES", {"in force": benchmark.Rule()})
    assert benchmark.main(["--low", "32", "--high", "256", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "adaptive-simulation.json").read_text())
    assert set(data["machines"]["as measured"]["loads"]["0.5x"]) == {
        "fixed 256",
        "fixed 32",
        "adaptive, in force",
    }
    assert data["command"] == f"python -m benchmarks.adaptive --low 32 --high 256 --out {tmp_path}"
    text = (tmp_path / "adaptive-simulation.md").read_text()
    assert "| adaptive, in force |" in text and text.strip() == capsys.readouterr().out.strip()
