"""`hasten build`: converts a model into an engine folder for this machine."""

import typer

from hasten.cli import terminal
from hasten.cli.options import Json, verb
from hasten.pipeline.config import BuildConfig


def register(app: typer.Typer) -> None:
    @verb(app, "build", arguments=["model"])
    def build(config: BuildConfig, *, json: Json = False) -> None:
        """Convert a model into an engine folder for this machine; prints the memory plan first."""
        from hasten.engine.build_profile import gib
        from hasten.pipeline.build import carry_out, plan_build

        plan = plan_build(config)
        rows = plan.memory.rows
        if not json:
            profile = plan.memory.profile
            title = f"{plan.model.name} {plan.scheme.name} on {plan.device.name}, profile {profile.name}"
            terminal.print_table(
                ("memory", "size", "for"),
                [(name, gib(num_bytes), remark) for name, num_bytes, remark in rows],
                title=title,
            )
        if not config.dry_run:
            with terminal.progress_bar() as on_progress:
                carry_out(plan, on_progress)
        engine = None if config.dry_run else str(plan.output)
        if json:
            import json as json_format
            from dataclasses import asdict

            memory = {name.replace(" ", "_"): num_bytes for name, num_bytes, _ in rows}
            values = {"engine": engine, "profile": asdict(plan.memory.profile), "memory_bytes": memory}
            terminal.result(json_format.dumps(values, indent=1))
        elif engine is not None:
            terminal.result(f"engine: {engine}")
