"""Writes a whole report: report.html, PERFORMANCE_REPORT.md and the plots, from result files alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hasten.bench.pick import Decision
from hasten.bench.result import BenchResult
from hasten.bench.served import Served
from hasten.report.html import render_html
from hasten.report.markdown import render_markdown
from hasten.report.plots import write_plots
from hasten.report.savings import Prices
from hasten.report.view import report_view


@dataclass(frozen=True)
class ReportFiles:
    """Where the parts of a report were written; `plots` by file name."""

    html: Path
    markdown: Path
    plots: dict[str, Path]


def write_report(
    results: Sequence[BenchResult],
    decision: Decision,
    out: Path,
    prices: Prices | None = None,
    served: Served | None = None,
) -> ReportFiles:
    """Writes the report into the folder `out`, over an earlier one.

    Args:
        results: one a candidate, in the order to show them; the decision's baseline among them.
        prices: what the user knows of cost and load; without it savings are in machines only.
        served: one of the candidates behind a server.

    Raises:
        UsageError: no results, or none of the decision's baseline.
    """
    view = report_view(results, decision, prices or Prices(), served)
    out.mkdir(parents=True, exist_ok=True)
    plots = write_plots(view, out / "plots")
    markdown = out / "PERFORMANCE_REPORT.md"
    markdown.write_text(render_markdown(view, [f"plots/{name}" for name in plots]), encoding="utf-8")
    html = out / "report.html"
    html.write_text(render_html(view), encoding="utf-8")
    return ReportFiles(html, markdown, plots)
