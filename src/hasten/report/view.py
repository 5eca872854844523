"""Everything that a report says, as data: `html` and `markdown` only lay it out.

Derived from result files, a decision and prices; holds no markup.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.bench.metrics import Percentiles, Spread, num_failed_requests
from hasten.bench.pick import Decision, Target
from hasten.bench.result import BenchConfig, BenchResult, Environment
from hasten.bench.served import Served
from hasten.report.columns import Column, judged_ratio, measured_concurrency, table_columns
from hasten.report.compare import Ratio, Row, caveats, comparison_rows
from hasten.report.findings import baseline_row, focus_row, savings_sentences, verdict_sentence
from hasten.report.savings import Prices, Savings, savings
from hasten.report.served import served_row
from hasten.report.units import (
    duration,
    kl_divergence,
    memory,
    percent,
    percent_change,
    ratio,
    significant,
    size_change,
)


@dataclass(frozen=True)
class Card:
    """One key number: the candidate's value, and beside it the baseline's."""

    title: str
    value: str
    detail: str


@dataclass(frozen=True)
class Problem:
    """Something that was not measured, and why."""

    label: str
    what: str
    reason: str


@dataclass(frozen=True)
class ReportView:
    """The content of a report, in its order.

    Args:
        verdict: the one sentence.
        judged_concurrency: the concurrency that the target judges, whose times are shown.
        focus: the row the cards are about: the pick, else the fastest measured candidate.
        served: the best native candidate over HTTP, beside itself without a server; None where none was to be served.
        facts: the machine, the versions and the settings, as (name, value).
    """

    title: str
    verdict: str
    decision: Decision
    rows: tuple[Row, ...]
    baseline: Row
    pick: Row | None
    focus: Row | None
    served: Row | None
    columns: tuple[Column, ...]
    concurrency: tuple[int, ...]
    judged_concurrency: int
    cards: tuple[Card, ...]
    not_recommended: tuple[tuple[str, str], ...]
    saved: Savings | None
    savings_text: tuple[str, ...]
    prices: Prices
    facts: tuple[tuple[str, str], ...]
    caveats: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def lines(self) -> tuple[Row, ...]:
        """What is drawn over concurrency."""
        return self.rows if self.served is None else (*self.rows, self.served)


def report_view(
    results: Sequence[BenchResult], decision: Decision, prices: Prices, served: Served | None = None
) -> ReportView:
    """Raises UsageError if the baseline is not among the results."""
    rows = comparison_rows(results, decision)
    concurrency = measured_concurrency(rows)
    judged = _judged_concurrency(results, decision, concurrency)
    baseline, focus = baseline_row(rows), focus_row(rows)
    pick = next((row for row in rows if row.role == "recommended"), None)
    over_http = served_row(served)
    saved = None if focus is None else savings(baseline.speeds, focus.speeds, prices)
    text = (
        ("Nothing is recommended, so nothing is saved.",)
        if pick is None
        else savings_sentences(saved, prices.currency, prices.per_machine_hour)
    )
    return ReportView(
        title=baseline.result.model.name,
        verdict=verdict_sentence(rows, decision, judged),
        decision=decision,
        rows=tuple(rows),
        baseline=baseline,
        pick=pick,
        focus=focus,
        served=over_http,
        columns=table_columns(rows, judged),
        concurrency=concurrency,
        judged_concurrency=judged,
        cards=_cards(baseline, focus, decision.gate.target, judged, concurrency),
        not_recommended=tuple((row.label, _reason(row)) for row in rows if row.role in ("candidate", "failed")),
        saved=saved if pick is not None else None,
        savings_text=text,
        prices=prices,
        facts=_facts(results),
        caveats=caveats(results),
        problems=tuple(_problems([*rows, over_http] if over_http is not None else rows)),
    )


def _judged_concurrency(results: Sequence[BenchResult], decision: Decision, measured: Sequence[int]) -> int:
    asked = [level for result in results for level in result.config.concurrency] or list(measured) or [1]
    return min(asked) if decision.gate.target == "latency" else max(asked)


def _reason(row: Row) -> str:
    if row.verdict is not None:
        return row.verdict.reason
    return f"failed: {row.result.failure}" if row.result.failure is not None else "was not judged"


def _cards(
    baseline: Row, focus: Row | None, target: Target, judged: int, concurrency: tuple[int, ...]
) -> tuple[Card, ...]:
    if focus is None:
        return ()
    cards = []
    speedup = judged_ratio(focus, judged)
    if speedup is not None:
        details = {"": "the spreads do not overlap", "tie": "a tie: the spreads overlap", "few runs": "in too few runs"}
        cards.append(Card(f"Speed-up, {target}, concurrency {judged}", ratio(speedup.value), details[speedup.mark]))
    for level in dict.fromkeys(concurrency[:1] + concurrency[-1:]):
        ours, theirs = focus.speed_at(level), baseline.speed_at(level)
        if ours is not None:
            value = f"{significant(ours.output_throughput_per_s.median)} tokens/s"
            before = None if theirs is None else f"{significant(theirs.output_throughput_per_s.median)} tokens/s"
            detail = _versus(before, focus.throughput_ratios.get(level))
            cards.append(Card(f"Throughput, concurrency {level}", value, detail))
    cards.extend(_time_cards(baseline, focus, judged))
    cards.extend(_cost_cards(baseline, focus))
    return tuple(cards)


def _time_cards(baseline: Row, focus: Row, judged: int) -> list[Card]:
    ours, theirs = focus.speed_at(judged), baseline.speed_at(judged)
    if ours is None:
        return []
    cards = []
    for title, field, ratios in (
        ("TTFT, median", "ttft_s", focus.ttft_ratios),
        ("TPOT, median", "tpot_s", focus.tpot_ratios),
        ("Latency, median", "e2e_latency_s", focus.latency_ratios),
    ):
        value: Percentiles | None = getattr(ours, field)
        before: Percentiles | None = None if theirs is None else getattr(theirs, field)
        if value is not None:
            detail = _versus(None if before is None else duration(before.p50), ratios.get(judged))
            cards.append(Card(f"{title}, concurrency {judged}", duration(value.p50), detail))
    return cards


def _cost_cards(baseline: Row, focus: Row) -> list[Card]:
    cards = []
    quality = focus.result.quality
    if quality is not None and focus.perplexity_increase is not None:
        kl = f"KL divergence {kl_divergence(quality.mean_kl)} nats/token"
        cards.append(Card("Perplexity", percent_change(focus.perplexity_increase), kl))
    if focus.result.memory is not None:
        reference = baseline.result.memory
        before = None if reference is None else reference.peak_bytes
        cards.append(_size_card("Peak memory", focus.result.memory.peak_bytes, before))
    if focus.result.footprint is not None:
        before = None if baseline.result.footprint is None else baseline.result.footprint.disk_bytes
        cards.append(_size_card("Size on disk", focus.result.footprint.disk_bytes, before))
    alone = focus.speed_at(1)
    if alone is not None and alone.mbu is not None:
        cards.append(Card("Of the memory bandwidth", percent(alone.mbu), "MBU of a decode step at concurrency 1"))
    return cards


def _size_card(title: str, value: int, reference: int | None) -> Card:
    if reference is None:
        return Card(title, memory(value), "the baseline was not measured")
    change = size_change(value, reference)
    return Card(title, memory(value), f"baseline {memory(reference)}{' · ' if change else ''}{change}")


def _versus(before: str | None, value: Ratio | None) -> str:
    if before is None:
        return "the baseline was not measured"
    ending = "" if value is None else f" · {value.text}"
    return f"baseline {before}{ending}"


def _problems(rows: Sequence[Row]) -> list[Problem]:
    problems = []
    for row in rows:
        if row.result.failure is not None:
            problems.append(Problem(row.label, "candidate failed", row.result.failure))
        problems.extend(Problem(row.label, what, reason) for what, reason in sorted(row.result.missing.items()))
        problems.extend(
            Problem(row.label, f"concurrency {level}", f"{num_failed} failed requests; their runs are left out")
            for level in row.result.config.concurrency
            if (num_failed := num_failed_requests(row.result, level))
        )
    return problems


def _facts(results: Sequence[BenchResult]) -> tuple[tuple[str, str], ...]:
    """Of the first result; what differs between results is in the caveats."""
    result = results[0]
    model, config, environment = result.model, result.config, result.environment
    versions = {name: version for each in results for name, version in each.environment.versions.items()}
    return (
        (
            "Model",
            f"{model.name}, {model.architecture or 'architecture not known'}, {_parameters(model.num_parameters)}",
        ),
        ("Revision", model.revision or "not known"),
        ("Weights that a decode step reads", _parameters(model.linear_parameters)),
        ("Processor", f"{environment.cpu}, {environment.num_cpus} CPUs"),
        ("Instructions", ", ".join(environment.cpu_flags) or "none listed"),
        ("Memory", memory(environment.memory_bytes)),
        ("Read bandwidth, measured", _bandwidth(environment)),
        ("GPUs", ", ".join(environment.gpus) or "none"),
        ("System", f"{environment.os}, Python {environment.python}"),
        ("Versions", ", ".join(f"{name} {versions[name]}" for name in sorted(versions))),
        ("hasten", result.hasten_version),
        (
            "Workload",
            f"{config.prompt_tokens} prompt tokens, {config.new_tokens} new tokens, greedy, seed {config.seed}",
        ),
        ("Concurrency", ", ".join(str(level) for level in config.concurrency)),
        ("Repeats", f"{config.num_runs} measured runs after {config.num_warmup} warm-up runs, candidates interleaved"),
        ("Load", _load(config)),
        ("Threads", "the server's own" if config.num_threads is None else str(config.num_threads)),
        ("Measured", _period(results)),
    )


def _parameters(count: int | None) -> str:
    return "number of parameters not known" if count is None else f"{count:,} parameters"


def _load(config: BenchConfig) -> str:
    load = config.load
    if load is None:
        return "requests handed over together, without a server"
    return f"{load.api} at {load.url}, {config.arrivals}"


def _bandwidth(environment: Environment) -> str:
    bandwidth = environment.read_bandwidth_bytes_per_s
    return "not measured" if bandwidth is None else f"{significant(bandwidth / 1e9)} GB/s"


def _period(results: Sequence[BenchResult]) -> str:
    first, last = min(result.created_at for result in results), max(result.created_at for result in results)
    return first if first == last else f"{first} to {last}"


def spread_text(spread: Spread, unit: str) -> str:
    """A median with its quartiles, for tooltips."""
    median = f"{significant(spread.median)} {unit}"
    if spread.num_samples < 2:
        return f"{median}, 1 run"
    low, high = significant(spread.low), significant(spread.high)
    return f"{median} (quartiles {low} to {high}, {spread.num_samples} runs)"
