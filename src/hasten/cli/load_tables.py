"""What `bench online` prints: what the server gave and what it used at each load, and its times.

Columns that `bench offline` has too are made in the same place (`report.columns`).
"""

from typing import TYPE_CHECKING

from hasten.cli import terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hasten.bench.metrics import Percentiles
    from hasten.bench.result import BenchResult, BenchRun

BUSY_CLIENT = 0.8  # a client process that works more than this of the time delays what it measures
TIMES = (("ttft_s", "TTFT"), ("itl_s", "ITL"), ("tpot_s", "TPOT"), ("e2e_latency_s", "latency"))


def print_load(measured: "BenchResult") -> None:
    """One online result: a row for each concurrency, or one for the open loop."""
    from hasten.bench.metrics import cached_share, errors_by_kind
    from hasten.report.columns import load_columns
    from hasten.report.compare import comparison_rows
    from hasten.report.units import significant

    [row] = comparison_rows([measured])
    kept, times, errors = [], [], []
    headings: list[str] = []
    for level in measured.config.concurrency:
        runs = [run for run in measured.runs if run.concurrency == level]
        if not runs:
            continue
        label = _label(measured, level)
        keys = ("tokens_per_s", "requests_per_s", "efficiency", "cpu_cores")
        columns = [column for column in load_columns(level) if column.key in keys]
        extra = _extra(measured, level, runs)
        headings = ["load", *(column.heading for column in columns), *extra]
        kept.append([label, *(terminal.cell_text(column.cell(row)) for column in columns), *extra.values()])
        speed = row.speed_at(level)
        times.append([label, *("-" if speed is None else _percentiles(getattr(speed, field)) for field, _ in TIMES)])
        failed = errors_by_kind(measured, level)
        num_requests = sum(len(run.requests) for run in runs)
        errors += [f"{label}: {count} of {num_requests} requests: {kind}" for kind, count in failed.most_common()]
    terminal.print_table(headings, kept, title=row.label)
    terminal.print_table(["P50 / P90 / P95 / P99", *(f"{name} (ms)" for _, name in TIMES)], times)
    if measured.memory is not None:
        terminal.result(f"server's peak memory {measured.memory.peak_rss_bytes / 2**20:.0f} MiB")
    for line in errors:
        terminal.result(line)
    for what, reason in measured.missing.items():
        if what not in ("quality", "footprint", "model"):
            terminal.result(f"{what}: {reason}")
    cached = cached_share(measured)
    if cached > 0:
        terminal.result(
            f"prefix cache: the server had {significant(cached * 100)} % of the prompts' tokens: what prompts share, "
            "such as a chat's template, or those of an earlier run with the same --seed"
        )
    client = max((run.client_share or 0.0 for run in measured.runs), default=0.0)
    if client > BUSY_CLIENT:
        terminal.note(
            f"a client process was busy for {significant(client * 100)} % of a run, so it delays what it measures: "
            "use more --clients, or another machine"
        )
    if measured.failure is not None:
        terminal.result(f"failed: {measured.failure}")


def _label(measured: "BenchResult", level: int) -> str:
    is_closed = measured.config.load is None or measured.config.load.arrivals == "closed"
    return f"concurrency {level}" if is_closed else measured.config.arrivals.removeprefix("open loop, ")


def _extra(measured: "BenchResult", level: int, runs: "Sequence[BenchRun]") -> dict[str, str]:
    """Columns that only a server has, those that were measured."""
    from hasten.bench.metrics import goodput_per_s, median, peak_in_flight
    from hasten.report.units import significant

    cells = {}
    load = measured.config.load
    if load is not None and load.arrivals != "closed":
        cells["in flight (most)"] = str(max(map(peak_in_flight, runs)))
    goodput = goodput_per_s(measured, level)
    if goodput is not None:
        cells["Goodput (1/s)"] = significant(goodput.median)
    gpus = [run.gpu for run in runs if run.gpu is not None]
    if gpus:
        cells["GPU busy (%)"] = f"{median(gpu.busy_share for gpu in gpus) * 100:.0f}"
        cells["GPU memory (MiB)"] = f"{max(gpu.peak_memory_bytes for gpu in gpus) / 2**20:.0f}"
        power_w = [gpu.power_w for gpu in gpus if gpu.power_w is not None]
        cells["power (W)"] = f"{median(power_w):.0f}" if power_w else "-"
    return cells


def _percentiles(values: "Percentiles | None") -> str:
    from hasten.report.units import significant

    if values is None:
        return "-"
    return " / ".join(significant(each * 1e3) for each in (values.p50, values.p90, values.p95, values.p99))
