"""The served engine: the best native candidate behind `hasten serve`, beside itself without a server."""

from collections.abc import Callable

from hasten.bench.served import Served
from hasten.report.columns import Cell, Column, load_columns
from hasten.report.compare import Row, comparison_rows
from hasten.report.units import NOT_MEASURED, memory, percent, significant


def served_row(served: Served | None) -> Row | None:
    """What was measured over HTTP; its ratios are to the same without a server. None where nothing was to be served."""
    if served is None:
        return None
    name = served.over_http.candidate.name
    return comparison_rows([served.offline, served.over_http], labels=[name, f"{name} served"])[1]


def served_columns(concurrency: int) -> tuple[Column, ...]:
    """As `load_columns`, with the share of the speed without a server."""
    share = Column("of_offline", "Throughput", "of offline", "Of offline", "%", _share(concurrency), True)
    columns = [column for column in load_columns(concurrency) if not column.key.startswith("tpot")]
    first, *others = (column for column in columns if column.key != "ratio")
    return (first, share, *others)


def served_finding(row: Row) -> str:
    """One sentence: how fast it is over HTTP and what is left of its speed, or why nothing was measured."""
    name = row.result.candidate.name
    if not row.speeds:
        return f"{name} was not measured behind a server: {row.result.failure or row.why_missing('runs')}"
    speed = row.speeds[-1]
    ratio = row.throughput_ratios.get(speed.concurrency)
    rate = significant(speed.output_throughput_per_s.median)
    found = f"{name} served over HTTP: {rate} output tokens/s at concurrency {speed.concurrency}"
    if ratio is None:
        return found
    share = f"{found}, {percent(ratio.value)} of its speed without a server"
    return f"{share}, within the spread" if ratio.is_tie else share


def served_method(row: Row) -> str:
    """How the figures came about."""
    used = row.result.memory
    peak = "" if used is None else f" The server's processes took at most {memory(used.peak_rss_bytes)} together."
    return (
        "Measured by hasten bench online at hasten serve on this machine, streaming: as many requests at once as the "
        "concurrency says, of the same lengths. Server and client share the machine. After each run came one without a "
        f"server, which the share is of.{peak}"
    )


def _share(concurrency: int) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        ratio = row.throughput_ratios.get(concurrency)
        if ratio is None:
            return Cell(NOT_MEASURED, None, note="one of the two sides has no speed")
        return Cell(f"{ratio.value * 100:.0f}", ratio.value, ratio.mark)

    return cell
