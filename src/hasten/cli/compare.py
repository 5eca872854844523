"""`hasten compare`: results side by side, from files or run folders."""

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import terminal
from hasten.cli.options import Json


def register(app: typer.Typer) -> None:
    @app.command("compare")
    def compare(
        results: Annotated[list[Path], typer.Argument(help="result files or run folders; the first is the reference")],
        json: Json = False,
    ) -> None:
        """Put results side by side; a ratio counts only where the spreads do not overlap."""
        from hasten.pipeline.reporting import read_results, served_of
        from hasten.report.compare import caveats

        measured = read_results(results)
        served = served_of(results[0]) if len(results) == 1 else None
        terminal.print_comparison(measured, served=served, as_json=json)
        for caveat in caveats(measured):
            terminal.note(caveat)
