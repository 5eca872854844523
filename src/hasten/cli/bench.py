"""`hasten bench offline` and `online`: one runtime in a process of its own, or a server."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hasten.cli import terminal
from hasten.cli.options import Json, OutputFile, verb
from hasten.pipeline.config import OfflineConfig, OnlineConfig

if TYPE_CHECKING:
    from hasten.bench.result import BenchResult


def register(app: typer.Typer) -> None:
    bench = typer.Typer(help="Measure speed.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(bench, name="bench")

    @bench.callback()
    def group() -> None:
        """Measure speed."""

    @verb(bench, "offline", arguments=["model"])
    def offline(config: OfflineConfig, *, output: OutputFile = None, json: Json = False) -> None:
        """Measure one runtime and precision without a server; the result can be compared and reported."""
        from hasten.pipeline.bench import bench_offline

        with terminal.progress_bar() as on_progress:
            measured = bench_offline(config, on_progress)
        if not _written(measured, output, json):
            terminal.print_speeds(measured)

    @verb(bench, "online", arguments=["url"])
    def online(config: OnlineConfig, *, output: OutputFile = None, json: Json = False) -> None:
        """Measure a server, ours or another, under a load; the result can be compared and reported."""
        from hasten.cli.load_tables import print_load
        from hasten.pipeline.bench_online import bench_online

        with terminal.progress_bar() as on_progress:
            measured = bench_online(config, on_progress)
        if not _written(measured, output, json):
            print_load(measured)


def _written(measured: "BenchResult", output: Path | None, as_json: bool) -> bool:
    """Writes the result to the file that was asked for; whether it is also on stdout, as JSON."""
    import msgspec

    from hasten.bench.result import write_result

    if output is not None:
        write_result(measured, output)
        terminal.note(f"result: {output}")
    if as_json:
        terminal.result(msgspec.json.format(msgspec.json.encode(measured), indent=1).decode())
    return as_json
