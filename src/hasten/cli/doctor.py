"""`hasten doctor`: what this machine can run, each problem with its cure."""

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import terminal
from hasten.cli.options import Json

SIGNS = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}


def register(app: typer.Typer) -> None:
    @app.command("doctor")
    def doctor(
        model: Annotated[str, typer.Argument(help="a model folder or hub id to check as well")] = "",
        json: Json = False,
    ) -> None:
        """Say what this machine can run; with a model, whether it fits. Exit code 1 if there is a problem."""
        from hasten.pipeline.doctor_model import diagnose

        terminal.note("looking at the machine, a few seconds")
        checks = diagnose(model or None, Path.cwd())
        if json:
            import msgspec

            terminal.result(msgspec.json.format(msgspec.json.encode(checks), indent=1).decode())
        else:
            for check in checks:
                terminal.result(f"{SIGNS[check.status]}  {check.name}: {check.detail}")
                if check.cure is not None:
                    terminal.result(f"         -> {check.cure}")
        if any(check.status == "problem" for check in checks):
            raise typer.Exit(1)
