"""`hasten bench offline`: one runtime in one precision, measured in a process of its own."""

import typer

from hasten.cli import terminal
from hasten.cli.options import Json, OutputFile, verb
from hasten.pipeline.config import OfflineConfig


def register(app: typer.Typer) -> None:
    bench = typer.Typer(help="Measure speed.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(bench, name="bench")

    @bench.callback()
    def group() -> None:
        """Measure speed."""

    @verb(bench, "offline", arguments=["model"])
    def offline(config: OfflineConfig, *, output: OutputFile = None, json: Json = False) -> None:
        """Measure one runtime and precision without a server; the result can be compared and reported."""
        from hasten.bench.result import write_result
        from hasten.pipeline.bench import bench_offline

        with terminal.progress_bar() as on_progress:
            measured = bench_offline(config, on_progress)
        if output is not None:
            write_result(measured, output)
            terminal.note(f"result: {output}")
        if json:
            import msgspec

            terminal.result(msgspec.json.format(msgspec.json.encode(measured), indent=1).decode())
        else:
            terminal.print_speeds(measured)
