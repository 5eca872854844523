"""Every metric and its formula, once. docs/glossary.md has the same formulas in words.

Times come from TokenEvent.time_s. For a request that was submitted at s with tokens at
t_1 .. t_n:

    ttft = t_1 - s        itl = t_{i+1} - t_i        tpot = (t_n - t_1) / (n - 1)
    e2e_latency = t_n - s

For a run (requests handed over together, or sent to a server) from start to end:

    output_throughput = output tokens / (end - start)
    request_throughput = requests / (end - start)
    goodput = requests that finished and kept every part of the objective / (end - start)
    scaling_efficiency(c) = output_throughput(c) / (c * output_throughput(1))
    mbu = weight bytes a step / tpot / measured read bandwidth, at concurrency 1

A percentile of n sorted samples is the linear interpolation at position q * (n - 1), counted
from 0. A spread is the median with the first and third quartile.

A run in which a request failed is no sample: the others had the machine for fewer than they
should. Its failed requests are counted. Goodput is of every run: a failed request is not good,
and that is what it measures. What cannot be computed is None.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from hasten.bench.result import BenchResult, BenchRun, Objective, RequestRecord

FINISHED = frozenset({"stop", "length"})
CLOCK_STEP_S = 1e-9


@dataclass(frozen=True)
class Spread:
    """A value over the measured runs: its median and its first and third quartile."""

    median: float
    low: float
    high: float
    num_samples: int

    def overlaps(self, other: "Spread") -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Percentiles:
    """A value over all requests (or gaps between tokens) of all runs, in seconds."""

    p50: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True)
class SpeedSummary:
    """One candidate at one concurrency.

    Args:
        output_throughput_per_s: output tokens a second, one sample a run.
        requests_per_s: finished requests a second, one sample a run.
        ttft_s, e2e_latency_s: over requests. itl_s: over gaps. tpot_s: over requests.
            None where the run has no such sample (one output token has no gap).
        ttft_spread_s, tpot_spread_s, e2e_latency_spread_s: one sample a run, the run's median.
        scaling_efficiency: None without a measurement at concurrency 1.
        mbu: share of the measured read bandwidth; above 1 where the weights stay in the
            processor's caches. None at concurrency above 1 or where weight bytes or
            bandwidth are not known.
        cpu_cores: CPU seconds of the process for each second of wall time, over all runs: CPU
            time is counted in steps too coarse for one short run. None where it is not known.
        num_failed_requests: requests that failed at this concurrency; their runs are left out.
    """

    concurrency: int
    output_throughput_per_s: Spread
    requests_per_s: Spread
    ttft_s: Percentiles
    e2e_latency_s: Percentiles
    itl_s: Percentiles | None
    tpot_s: Percentiles | None
    ttft_spread_s: Spread
    tpot_spread_s: Spread | None
    e2e_latency_spread_s: Spread
    scaling_efficiency: float | None
    mbu: float | None
    cpu_cores: float | None
    num_failed_requests: int


def percentile(samples: Iterable[float], q: float) -> float:
    """The q-quantile (q from 0 to 1) by linear interpolation between the two nearest samples.

    Raises:
        ValueError: no samples.
    """
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("a percentile needs at least one sample")
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    low, high = ordered[below], ordered[above]
    # the minimum keeps rounding from leaving the interval between the two samples
    return low if low == high else min(low + (high - low) * (position - below), high)


def median(samples: Iterable[float]) -> float:
    return percentile(samples, 0.5)


def spread(samples: Sequence[float]) -> Spread:
    """Raises ValueError without samples."""
    return Spread(median(samples), percentile(samples, 0.25), percentile(samples, 0.75), len(samples))


def percentiles(samples: Sequence[float]) -> Percentiles:
    """Raises ValueError without samples."""
    return Percentiles(*(percentile(samples, q) for q in (0.5, 0.9, 0.95, 0.99)))


def ttft_s(request: RequestRecord) -> float:
    return request.token_times_s[0] - request.submitted_s


def e2e_latency_s(request: RequestRecord) -> float:
    return request.token_times_s[-1] - request.submitted_s


def itl_s(request: RequestRecord) -> tuple[float, ...]:
    """The gaps between tokens; () for a single token."""
    return tuple(after - before for before, after in pairwise(request.token_times_s))


def tpot_s(request: RequestRecord) -> float | None:
    """None for a single token."""
    times = request.token_times_s
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def has_failed(request: RequestRecord) -> bool:
    """Whether it ended otherwise than by a stop or its length, or without any token."""
    return request.error is not None or request.finish_reason not in FINISHED or not request.token_times_s


def cached_share(result: BenchResult) -> float:
    """Share of the prompts' tokens that a server had in its prefix cache, as far as it tells."""
    requests = [request for run in result.runs for request in run.requests]
    num_tokens = sum(request.num_prompt_tokens for request in requests)
    return sum(request.num_cached_tokens or 0 for request in requests) / max(1, num_tokens)


def is_usable(run: BenchRun) -> bool:
    """Whether every request of the run finished, and its times run forward."""
    if (
        not run.requests
        or run.end_s - run.start_s < CLOCK_STEP_S
        or any(has_failed(request) for request in run.requests)
    ):
        return False
    return all(
        before <= after
        for request in run.requests
        for before, after in pairwise((request.submitted_s, *request.token_times_s))
    )


def num_failed_requests(result: BenchResult, concurrency: int) -> int:
    return sum(has_failed(request) for run in result.runs if run.concurrency == concurrency for request in run.requests)


def errors_by_kind(result: BenchResult, concurrency: int) -> Counter[str]:
    """How many requests failed for each reason, at one concurrency."""
    return Counter(
        request.error or f"ended by {request.finish_reason}"
        for run in result.runs
        if run.concurrency == concurrency
        for request in run.requests
        if has_failed(request)
    )


def is_good(request: RequestRecord, objective: Objective) -> bool:
    """Whether it finished and kept every part of the objective."""
    if has_failed(request):
        return False
    kept = (
        (objective.ttft_s, ttft_s(request)),
        (objective.tpot_s, tpot_s(request)),
        (objective.e2e_latency_s, e2e_latency_s(request)),
    )
    return all(limit is None or value is None or value <= limit for limit, value in kept)


def goodput_per_s(result: BenchResult, concurrency: int) -> Spread | None:
    """Good requests a second, one sample a run, failed ones too; None where no objective was stated."""
    objective = None if result.config.load is None else result.config.load.objective
    if objective is None or objective == Objective():
        return None
    samples = [
        sum(is_good(request, objective) for request in run.requests) / (run.end_s - run.start_s)
        for run in result.runs
        if run.concurrency == concurrency and run.end_s - run.start_s >= CLOCK_STEP_S
    ]
    return spread(samples) if samples else None


def peak_in_flight(run: BenchRun) -> int:
    """The most requests that were under way at the same time, from submission to the last token."""
    changes = [
        change
        for request in run.requests
        if request.token_times_s
        for change in ((request.submitted_s, 1), (request.token_times_s[-1], -1))
    ]
    return max(accumulate(change for _, change in sorted(changes)), default=0)


def mbu(weight_bytes_per_token: float | None, step_s: float, bandwidth_bytes_per_s: float | None) -> float | None:
    """Share of the read bandwidth that a decode step at batch 1 reaches; None where a part is not known."""
    if not weight_bytes_per_token or not bandwidth_bytes_per_s or step_s <= 0:
        return None
    return weight_bytes_per_token / step_s / bandwidth_bytes_per_s


def summarize(result: BenchResult) -> tuple[SpeedSummary, ...]:
    """One summary for each concurrency that has a usable run, lowest concurrency first."""
    runs_at: dict[int, list[BenchRun]] = {}
    for run in result.runs:
        if is_usable(run):
            runs_at.setdefault(run.concurrency, []).append(run)
    throughput_alone = median(_output_throughput(run) for run in runs_at[1]) if 1 in runs_at else None
    return tuple(
        _summarize_runs(result, concurrency, runs_at[concurrency], throughput_alone) for concurrency in sorted(runs_at)
    )


def _output_throughput(run: BenchRun) -> float:
    return sum(len(request.token_times_s) for request in run.requests) / (run.end_s - run.start_s)


def _cpu_cores(runs: Sequence[BenchRun]) -> float | None:
    cpu_s = [run.cpu_s for run in runs if run.cpu_s is not None]
    return sum(cpu_s) / sum(run.end_s - run.start_s for run in runs) if len(cpu_s) == len(runs) else None


def _tpots(runs: Iterable[BenchRun]) -> list[float]:
    return [tpot for run in runs for request in run.requests if (tpot := tpot_s(request)) is not None]


def _summarize_runs(
    result: BenchResult, concurrency: int, runs: Sequence[BenchRun], throughput_alone: float | None
) -> SpeedSummary:
    requests = [request for run in runs for request in run.requests]
    gaps = [gap for request in requests for gap in itl_s(request)]
    tpots = _tpots(runs)
    tpot_spread = spread([median(each) for run in runs if (each := _tpots([run]))]) if tpots else None
    throughput = spread([_output_throughput(run) for run in runs])
    share = None
    if concurrency == 1 and result.footprint is not None and tpot_spread is not None:
        bandwidth = result.environment.read_bandwidth_bytes_per_s
        share = mbu(result.footprint.weight_bytes_per_token, tpot_spread.median, bandwidth)
    return SpeedSummary(
        concurrency=concurrency,
        output_throughput_per_s=throughput,
        requests_per_s=spread([len(run.requests) / (run.end_s - run.start_s) for run in runs]),
        ttft_s=percentiles([ttft_s(request) for request in requests]),
        e2e_latency_s=percentiles([e2e_latency_s(request) for request in requests]),
        itl_s=percentiles(gaps) if gaps else None,
        tpot_s=percentiles(tpots) if tpots else None,
        ttft_spread_s=spread([median(map(ttft_s, run.requests)) for run in runs]),
        tpot_spread_s=tpot_spread,
        e2e_latency_spread_s=spread([median(map(e2e_latency_s, run.requests)) for run in runs]),
        scaling_efficiency=throughput.median / (concurrency * throughput_alone) if throughput_alone else None,
        mbu=share,
        cpu_cores=_cpu_cores(runs),
        num_failed_requests=num_failed_requests(result, concurrency),
    )
