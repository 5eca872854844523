"""What the verbs print: tables on stdout, notes and progress on stderr.

rich is imported inside the functions, so that `hasten --help` stays quick.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hasten.bench.pick import Decision
    from hasten.bench.result import BenchResult
    from hasten.bench.served import Served
    from hasten.pipeline.plan import Plan
    from hasten.pipeline.progress import OnProgress, Progress
    from hasten.report.columns import Cell
    from hasten.report.compare import Row

LINE_EVERY_S = 5.0


def note(message: str) -> None:
    """One message to the user, on stderr."""
    print(message, file=sys.stderr, flush=True)  # noqa: T201


def result(text: str) -> None:
    """A result, on stdout."""
    print(text, flush=True)  # noqa: T201


def duration(seconds: float) -> str:
    """Seconds as a person says them: 8 s, 3 min 20 s, 1 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@contextmanager
def progress_bar() -> Iterator["OnProgress"]:
    """A bar with the time left on a terminal, one line a stage elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _LinePerStage()
        return
    columns = TextColumn("{task.fields[stage]:8}"), BarColumn(), TextColumn("{task.percentage:3.0f} %")
    with Bar(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0, stage="")

        def show(progress: "Progress") -> None:
            left = f"{duration(progress.left_s)} left"
            bar.update(
                task, completed=progress.done_share, stage=progress.stage, description=f"{left}, {progress.detail}"
            )

        yield show


class _LinePerStage:
    """Progress for a log file: a line when the stage changes, and one every few seconds."""

    def __init__(self) -> None:
        self._stage = ""
        self._printed_s = 0.0

    def __call__(self, progress: "Progress") -> None:
        now_s = time.monotonic()
        if progress.stage != self._stage or now_s - self._printed_s > LINE_EVERY_S:
            self._stage, self._printed_s = progress.stage, now_s
            note(f"{progress.stage:8} {progress.done_share:4.0%}, {duration(progress.left_s)} left: {progress.detail}")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout; the first column is left-aligned, the others right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_plan(plan: "Plan", run_path: Path, as_json: bool) -> None:
    """The plan of a dry run, with its cost."""
    if as_json:
        import dataclasses

        result(json.dumps(dataclasses.asdict(plan), indent=1))
        return
    rows = [
        (
            cost.candidate.name + (" (baseline)" if cost.candidate.name == plan.baseline else ""),
            f"{cost.memory_bytes / 1e9:.2f}",
            f"{cost.prepare_bytes / 1e9:.2f}" if cost.prepare_bytes else "-",
            f"{cost.disk_bytes / 1e9:.2f}",
            duration(cost.prepare_s + cost.round_s * plan.num_rounds),
        )
        for cost in plan.candidates
    ]
    if plan.served_s:
        rows.append(("the best native one, served", "-", "-", "-", duration(plan.served_s)))
    print_table(("candidate", "memory GB", "to convert GB", "disk GB", "time"), rows)
    for name, reason in plan.left_out.items():
        result(f"left out: {name} ({reason})")
    result(
        f"{plan.num_rounds} measured runs each, about {duration(plan.time_s)} in all; at most "
        f"{plan.memory_bytes / 1e9:.1f} GB of memory and {plan.disk_bytes / 1e9:.2f} GB of disk in {run_path}"
    )


def print_comparison(
    results: Sequence["BenchResult"],
    decision: "Decision | None" = None,
    served: "Served | None" = None,
    *,
    as_json: bool = False,
) -> None:
    """The results side by side, with the verdicts if there is a decision, and what one of them gives when served."""
    from hasten.report.columns import measured_concurrency, table_columns
    from hasten.report.compare import comparison_rows
    from hasten.report.served import served_columns, served_row

    rows = comparison_rows(results, decision)
    over_http = served_row(served)
    levels = measured_concurrency(rows) or (1,)
    is_throughput = decision is not None and decision.gate.target == "throughput"
    columns = table_columns(rows, judged_concurrency=levels[-1 if is_throughput else 0])
    if as_json:
        values = [
            {
                "candidate": row.label,
                "role": row.role,
                "reason": row.verdict.reason if row.verdict is not None else None,
                **{column.key: column.cell(row).value for column in columns},
            }
            for row in rows
        ]
        found: dict[str, object] = {"pick": decision.pick if decision is not None else None, "candidates": values}
        if over_http is not None:
            found["served"] = {
                "candidate": over_http.result.candidate.name,
                "failure": over_http.result.failure,
                "loads": [
                    {
                        "concurrency": speed.concurrency,
                        **{column.key: column.cell(over_http).value for column in served_columns(speed.concurrency)},
                    }
                    for speed in over_http.speeds
                ],
            }
        result(json.dumps(found, indent=1))
        return
    shown = [column for column in columns if column.key in _shown_keys(levels)]
    headers = ["candidate", *(SHORT_HEADINGS.get(column.key, column.heading) for column in shown)]
    table = []
    for row in rows:
        cells = [column.cell(row) for column in shown]
        table.append([f"{row.label}{MARKS[row.role]}", *(cell_text(cell) for cell in cells)])
    print_table(headers, table)
    for row in rows:
        if row.verdict is not None:
            result(f"{row.label}: {row.verdict.reason}")
        elif row.result.failure is not None:
            result(f"{row.label}: failed: {row.result.failure}")
    if over_http is not None:
        _print_served(over_http)


def _print_served(row: "Row") -> None:
    from hasten.report.served import served_columns, served_finding

    table, headers = [], []
    for speed in row.speeds:
        columns = [column for column in served_columns(speed.concurrency) if column.key in SERVED_KEYS]
        headers = ["concurrency", *(column.heading for column in columns)]
        table.append([str(speed.concurrency), *(cell_text(column.cell(row)) for column in columns)])
    if table:
        print_table(headers, table, title=row.label)
    result(served_finding(row))


SERVED_KEYS = {"tokens_per_s", "of_offline", "requests_per_s", "efficiency"} | {
    f"{time}_{percentile}" for time in ("ttft", "itl", "latency") for percentile in ("p50", "p99")
}
MARKS = {"baseline": " (baseline)", "recommended": " *", "candidate": "", "failed": " (failed)"}
SHORT_HEADINGS = {
    "speedup": "speed-up",
    "ttft_p50": "TTFT ms",
    "tpot_p50": "TPOT ms",
    "perplexity_change": "perplexity",
    "kl": "KL nats",
    "peak_memory": "memory MiB",
    "disk": "disk MiB",
    "mbu": "MBU %",
}


def _shown_keys(levels: Sequence[int]) -> set[str]:
    return {*SHORT_HEADINGS, f"tokens_per_s_{levels[0]}", f"tokens_per_s_{levels[-1]}"}


def cell_text(cell: "Cell") -> str:
    """A cell on the terminal."""
    if not cell.is_measured:
        return "-"
    return f"{cell.text} {cell.detail}" if cell.detail in {"tie", "few runs"} else cell.text


def print_speeds(measured: "BenchResult") -> None:
    """One result: a row for each concurrency."""
    from hasten.report.columns import load_columns
    from hasten.report.compare import comparison_rows

    [row] = comparison_rows([measured])
    keys = (
        "tokens_per_s",
        "requests_per_s",
        "efficiency",
        "ttft_p50",
        "ttft_p95",
        "itl_p50",
        "latency_p50",
    )
    table, headers = [], ["concurrency"]
    for speed in row.speeds:
        columns = [column for column in load_columns(speed.concurrency) if column.key in keys]
        headers = ["concurrency", *(column.heading for column in columns)]
        table.append([str(speed.concurrency), *(cell_text(column.cell(row)) for column in columns)])
    print_table(headers, table, title=row.label)
    if measured.memory is not None:
        gpu_bytes = measured.memory.peak_device_bytes
        on_gpu = "" if gpu_bytes is None else f", {gpu_bytes / 2**20:.0f} MiB of tensors on the GPU"
        result(f"peak memory {measured.memory.peak_rss_bytes / 2**20:.0f} MiB{on_gpu}")
    if measured.failure is not None:
        result(f"failed: {measured.failure}")
