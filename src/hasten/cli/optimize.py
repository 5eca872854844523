"""`hasten optimize`: the whole chain, with the plan first and the table last."""

from typing import TYPE_CHECKING

import typer

from hasten.cli import terminal
from hasten.cli.options import Json, verb
from hasten.errors import GateError
from hasten.pipeline.config import OptimizeConfig

if TYPE_CHECKING:
    from hasten.pipeline.plan import Plan


def register(app: typer.Typer) -> None:
    @verb(app, "optimize", arguments=["model"])
    def optimize(config: OptimizeConfig, *, json: Json = False) -> None:
        """Measure every runtime and precision, check quality, pick the fastest that passes, and report."""
        from hasten.pipeline.optimize import carry_out
        from hasten.pipeline.prepare_plan import prepare_plan

        terminal.note("looking at the machine and the model, a few seconds")
        prepared = prepare_plan(config)
        for check in prepared.checks:
            if check.status == "warning":
                terminal.note(f"warning: {check.name}: {check.detail}; {check.cure}")
        if config.dry_run:
            terminal.print_plan(prepared.plan, prepared.run_path, as_json=json)
            return
        terminal.note(_summary(prepared.plan))
        with terminal.progress_bar() as on_progress:
            outcome = carry_out(prepared, on_progress)
        terminal.print_comparison(outcome.results, outcome.decision, outcome.served, as_json=json)
        terminal.note(f"report: {outcome.run_path / 'report.html'}")
        if outcome.decision.pick is None:
            raise GateError("nothing is recommended: no candidate is faster than the baseline and good enough")
        terminal.note(f"recommended: {outcome.decision.pick}, kept in {outcome.run_path / 'engine'}")


def _summary(plan: "Plan") -> str:
    left_out = "".join(f"\n  left out: {name} ({reason})" for name, reason in plan.left_out.items())
    return (
        f"{len(plan.candidates)} candidates, baseline {plan.baseline}, {plan.num_rounds} measured runs each; "
        f"about {terminal.duration(plan.time_s)}, {plan.memory_bytes / 1e9:.1f} GB of memory, "
        f"{plan.disk_bytes / 1e9:.2f} GB of disk{left_out}"
    )
