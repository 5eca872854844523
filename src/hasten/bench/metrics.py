"""Every metric and its formula, once. docs/glossary.md has the same formulas in words.

Times come from TokenEvent.time_s. For a request that was submitted at s with tokens at
t_1 .. t_n:

    ttft = t_1 - s        itl = t_{i+1} - t_i        tpot = (t_n - t_1) / (n - 1)
    e2e_latency = t_n - s

For a run (requests handed over together) from start to end:

    output_throughput = output tokens / (end - start)
    request_throughput = requests / (end - start)
    scaling_efficiency(c) = output_throughput(c) / (c * output_throughput(1))
    mbu = weight bytes a step / tpot / measured read bandwidth, at concurrency 1
"""

from dataclasses import dataclass


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
        ttft_spread_s, tpot_spread_s: one sample a run, the run's median.
        scaling_efficiency: None without a measurement at concurrency 1.
        mbu: share of the measured read bandwidth, 0 to 1; None at concurrency above 1 or
            where weight bytes or bandwidth are not known.
        cpu_cores: CPU seconds of the process for each second of wall time.
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
    scaling_efficiency: float | None
    mbu: float | None
    cpu_cores: float
