import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from result_samples import make_result, make_run

from hasten.bench.metrics import Spread, itl_s, percentile, summarize, tpot_s

SAMPLES = st.lists(st.floats(0, 1e6), min_size=1, max_size=40)


@given(SAMPLES, st.floats(0, 1))
def test_percentile_is_numpys_linear_interpolation(samples: list[float], q: float) -> None:
    assert percentile(samples, q) == pytest.approx(np.quantile(samples, q), rel=1e-9, abs=1e-9)


@given(SAMPLES, st.floats(0, 1), st.floats(0, 1))
def test_percentile_is_monotonic_and_within_the_samples(samples: list[float], a: float, b: float) -> None:
    low, high = percentile(samples, min(a, b)), percentile(samples, max(a, b))
    assert min(samples) <= low <= high <= max(samples)


def test_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 0.5)


def test_summary_of_known_times() -> None:
    # first token after 0.1 s, 4 gaps of 0.1 s: 5 tokens in 0.5 s
    [summary] = summarize(make_result("fake", "fp32", [0.1, 0.1, 0.1]))
    assert summary.output_throughput_per_s.median == pytest.approx(10)
    assert summary.requests_per_s.median == pytest.approx(2)
    assert summary.ttft_s.p99 == pytest.approx(0.1)
    assert summary.e2e_latency_s.p50 == pytest.approx(0.5)
    assert summary.e2e_latency_spread_s.median == pytest.approx(0.5)
    assert summary.itl_s is not None
    assert summary.itl_s.p50 == pytest.approx(0.1)
    assert summary.tpot_s is not None
    assert summary.tpot_s.p50 == pytest.approx(0.1)
    assert summary.cpu_cores == pytest.approx(2)
    # 1e6 bytes in 0.1 s is 1e7 bytes/s of 1e9
    assert summary.mbu == pytest.approx(0.01)
    assert summary.scaling_efficiency == pytest.approx(1)
    assert summary.num_failed_requests == 0


def test_scaling_efficiency_compares_with_concurrency_1() -> None:
    runs = [make_run(0.1), make_run(0.1, ttft_s=0.6, concurrency=4)]
    alone, four = summarize(make_result("fake", "fp32", [], runs=runs, concurrency=(1, 4)))
    assert (alone.concurrency, four.concurrency) == (1, 4)
    assert four.output_throughput_per_s.median == pytest.approx(20)
    assert four.scaling_efficiency == pytest.approx(0.5)
    assert four.mbu is None


def test_without_concurrency_1_there_is_no_scaling_efficiency() -> None:
    [summary] = summarize(make_result("fake", "fp32", [0.1], concurrency=(2,)))
    assert summary.scaling_efficiency is None


def test_one_token_has_no_gap() -> None:
    runs = [make_run(0.1, num_tokens=1)]
    [summary] = summarize(make_result("fake", "fp32", [], runs=runs))
    assert (summary.itl_s, summary.tpot_s, summary.tpot_spread_s, summary.mbu) == (None, None, None, None)
    assert tpot_s(runs[0].requests[0]) is None
    assert itl_s(runs[0].requests[0]) == ()


def test_mbu_needs_bytes_and_bandwidth() -> None:
    result = make_result("fake", "fp32", [0.1])
    assert result.footprint is not None
    unknown_bytes = dataclasses.replace(result.footprint, weight_bytes_per_token=None)
    unknown_bandwidth = dataclasses.replace(result.environment, read_bandwidth_bytes_per_s=None)
    for changed in (
        dataclasses.replace(result, footprint=None),
        dataclasses.replace(result, footprint=unknown_bytes),
        dataclasses.replace(result, environment=unknown_bandwidth),
    ):
        assert summarize(changed)[0].mbu is None


@pytest.mark.parametrize("finish_reason", ["error", "cancelled"])
def test_a_run_with_a_failed_request_is_counted_and_left_out(finish_reason: str) -> None:
    runs = [make_run(0.1), make_run(0.5, round_index=1, finish_reason=finish_reason)]
    [summary] = summarize(make_result("fake", "fp32", [], runs=runs))
    assert summary.num_failed_requests == 1
    assert summary.output_throughput_per_s == Spread(*[pytest.approx(10)] * 3, 1)


def test_a_request_without_tokens_has_failed() -> None:
    run = make_run(0.1)
    empty = dataclasses.replace(run.requests[0], token_times_s=())
    runs = [run, dataclasses.replace(run, requests=(empty,))]
    assert summarize(make_result("fake", "fp32", [], runs=runs))[0].num_failed_requests == 1


def test_no_usable_run_gives_no_summary() -> None:
    assert summarize(make_result("fake", "fp32", [], runs=[])) == ()
    backwards = dataclasses.replace(make_run(0.1), start_s=99.0)
    no_time = dataclasses.replace(make_run(0.1), end_s=10.0)
    assert summarize(make_result("fake", "fp32", [], runs=[backwards, no_time])) == ()


@given(st.floats(0, 9), st.floats(0, 9), st.floats(0, 9), st.floats(0, 9))
def test_overlap_is_symmetric_and_touching_counts(a: float, b: float, c: float, d: float) -> None:
    first, second = Spread(a, min(a, b), max(a, b), 3), Spread(c, min(c, d), max(c, d), 3)
    assert first.overlaps(second) == second.overlaps(first)
    assert first.overlaps(first)
