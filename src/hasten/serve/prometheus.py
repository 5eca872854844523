"""Metrics of a server in Prometheus's text format, by the names that vLLM made usual.

What happens to requests is counted here by `Service`; the engine's figures are read from its client
when somebody asks. Counting one token costs well below a microsecond, which is why the histograms are
lists of numbers and become prometheus_client's families only when they are read.

Names and units: seconds, tokens, shares between 0 and 1. `docs/serving.md` has the table.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from hasten.runtimes.base import EngineStats

if TYPE_CHECKING:
    from hasten.serve.engine_client import EngineClient

PREFIX = "hasten:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

FIRST_TOKEN_S = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
BETWEEN_TOKENS_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
REQUEST_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

# finish reasons as vLLM's dashboards have them
FINISHED_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}


class Histogram:
    """Counts of values in buckets whose upper bounds are inclusive."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, as the exposition has them."""
        total, rows = 0, []
        for bound, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            total += count
            rows.append(("+Inf" if bound == math.inf else str(float(bound)), float(total)))
        return rows


class ServeMetrics(Collector):
    """Everything that a server counts."""

    def __init__(self, model_name: str, client: "EngineClient") -> None:
        self.time_to_first_token_s = Histogram(FIRST_TOKEN_S)
        self.inter_token_latency_s = Histogram(BETWEEN_TOKENS_S)
        self.queue_time_s = Histogram(FIRST_TOKEN_S)
        self.e2e_latency_s = Histogram(REQUEST_S)
        self.request_prompt_tokens = Histogram(TOKENS)
        self.request_generation_tokens = Histogram(TOKENS)
        self.finished = Counter(dict.fromkeys(FINISHED_REASONS.values(), 0))
        self.errors: Counter[str] = Counter()
        self._model_name = model_name
        self._client = client
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def exposition(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._histograms()
        yield from self._engine()
        finished = self._counter("request_success", "Continuations by how they ended.", "finished_reason")
        for reason, count in self.finished.items():
            finished.add_metric([self._model_name, reason], count)
        yield finished
        errors = self._counter("request_errors", "Requests answered with an error, by its kind.", "kind")
        for kind, count in self.errors.items():
            errors.add_metric([self._model_name, kind], count)
        yield errors

    def _counter(self, name: str, text: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily(PREFIX + name, text, labels=["model_name", *labels])

    def _total(self, name: str, text: str, value: float) -> Metric:
        counter = self._counter(name, text)
        counter.add_metric([self._model_name], value)
        return counter

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
        gauge.add_metric([self._model_name], float(value))
        return gauge

    def _histograms(self) -> Iterator[Metric]:
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From a request's arrival to its first token.", self.time_to_first_token_s),
            ("inter_token_latency_seconds", "Between tokens of a continuation.", self.inter_token_latency_s),
            ("request_queue_time_seconds", "From a request's arrival to its first step.", self.queue_time_s),
            ("e2e_request_latency_seconds", "From a request's arrival to its last token.", self.e2e_latency_s),
            ("request_prompt_tokens", "Tokens of a request's prompt.", self.request_prompt_tokens),
            ("request_generation_tokens", "Tokens generated for a request.", self.request_generation_tokens),
        ):
            family = HistogramMetricFamily(PREFIX + name, text, labels=["model_name"])
            family.add_metric([self._model_name], buckets=histogram.buckets(), sum_value=histogram.sum)
            yield family

    def _engine(self) -> Iterator[Metric]:
        """The engine's own figures; counters begin again at 0 when it was restarted, which Prometheus expects."""
        stats = self._client.stats
        is_ready = self._client.is_ready
        yield self._gauge("num_requests_running", "Sequences in the running batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Sequences that wait for a place in the batch.", stats.num_waiting)
        yield self._gauge("engine_ready", "1 while there is an engine process that takes requests.", is_ready)
        yield self._total("prompt_tokens", "Prompt tokens of accepted requests.", stats.num_prompt_tokens)
        yield self._total("generation_tokens", "Tokens generated.", stats.num_generated_tokens)
        if stats.num_kv_blocks:
            yield from self._kv_cache(stats)

    def _kv_cache(self, stats: EngineStats) -> Iterator[Metric]:
        """Not of an encoder, which has no such cache, nor of a model that is being loaded."""
        usage = stats.num_used_kv_blocks / stats.num_kv_blocks
        preemptions = "Sequences put back because the KV cache was full."
        looked_up = "Prompt tokens looked up in the prefix cache."
        yield self._gauge("kv_cache_usage_perc", "Share of the KV cache's blocks in use, 0 to 1.", usage)
        yield self._total("num_preemptions", preemptions, stats.num_preemptions)
        yield self._total("prefix_cache_queries", looked_up, stats.num_prompt_tokens)
        yield self._total("prefix_cache_hits", "Prompt tokens found there.", stats.num_prefix_hit_tokens)
