"""`hasten report`: the report of a run, or of result files, written again."""

import typer

from hasten.cli import terminal
from hasten.cli.options import verb
from hasten.pipeline.config import ReportConfig


def register(app: typer.Typer) -> None:
    @verb(app, "report", arguments=["results"])
    def report(config: ReportConfig) -> None:
        """Write report.html, PERFORMANCE_REPORT.md and the pictures from results."""
        from hasten.pipeline.reporting import report as write

        files = write(config)
        for path in (files.html, files.markdown, *files.plots.values()):
            terminal.result(str(path))
