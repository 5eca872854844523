"""`hasten profile`: where the time of a decode step goes, runtime beside runtime."""

from typing import TYPE_CHECKING

import typer

from hasten.cli import terminal
from hasten.cli.options import Json, verb
from hasten.pipeline.config import ProfileConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hasten.pipeline.profiling import ModelProfile, RuntimeProfile


def register(app: typer.Typer) -> None:
    @verb(app, "profile", arguments=["model"])
    def profile(config: ProfileConfig, *, json: Json = False) -> None:
        """Show where the time of a decode step goes, in the baseline and in the engine, with a trace of each."""
        from hasten.pipeline.profiling import profile_model

        terminal.note("looking at the machine and the model, a few seconds")
        with terminal.progress_bar() as on_progress:
            found = profile_model(config, on_progress)
        if json:
            import msgspec

            encoded = msgspec.json.encode(found, enc_hook=str)
            terminal.result(msgspec.json.format(encoded, indent=1).decode())
        else:
            _print(found)
        traces = [each.trace for each in found.profiles if each.trace is not None]
        terminal.note(f"traces, for ui.perfetto.dev: {found.folder}: {', '.join(traces) or 'none'}")


def _print(found: "ModelProfile") -> None:
    names = [each.candidate.name for each in found.profiles]
    machine = found.profiles[0].environment
    hardware = machine.cpu if found.device == "cpu" else machine.gpus[0]
    terminal.result(f"{found.model} on {hardware}: a decode step at batch 1 after {found.prompt_tokens} tokens")
    terminal.print_table(("", *names), [*_figures(found.profiles), *_parts(found.profiles)])
    for each in found.profiles:
        for field, reason in each.missing.items():
            terminal.result(f"{each.candidate.name}: no {FIELDS[field]}: {reason}")
    for name, reason in found.failures.items():
        terminal.result(f"{name}: not profiled: {reason}")
    for each in found.profiles:
        terminal.result(f"{each.candidate.name}: bottleneck: {each.bottleneck}")


FIELDS = {
    "activity": "launches, busy share and gaps",
    "power_w": "power",
    "read_bytes": "bytes read",
    "trace": "trace",
    "nsys_report": "Nsight Systems report",
}


def _figures(profiles: "Sequence[RuntimeProfile]") -> list[tuple[str, ...]]:
    rows = [_figures_of(each) for each in profiles]
    return [(label, *(row[label] for row in rows)) for label in rows[0] if any(row[label] != "-" for row in rows)]


def _figures_of(profile: "RuntimeProfile") -> dict[str, str]:
    activity, step_s = profile.activity, profile.step_s
    return {
        "time per output token, ms": f"{step_s * 1e3:.3f}",
        "tokens/s": f"{1 / step_s:.1f}",
        "launches a step, from the CPU": "-" if activity is None else f"{activity.launches:.1f}",
        "waits of the CPU a step": "-" if activity is None else f"{activity.waits:.1f}",
        "kernels a step, on the GPU": "-" if activity is None else f"{activity.kernels:.1f}",
        "copies a step, on the GPU": "-" if activity is None else f"{activity.copies:.1f}",
        "GPU busy, ms": "-" if activity is None else f"{activity.busy_s * 1e3:.3f}",
        "GPU busy, % of the step": "-" if activity is None else f"{activity.busy_share(step_s):.1%}",
        "step under the profiler, ms": "-" if activity is None else f"{activity.traced_step_s * 1e3:.3f}",
        "GPU busy in it, %": "-" if activity is None else f"{activity.traced_busy_share:.1%}",
        "idle gaps in it": "-" if activity is None else f"{activity.gaps:.1f}",
        "median gap, µs": "-" if activity is None or activity.median_gap_s is None else _us(activity.median_gap_s),
        "read a step, MB": "-" if profile.read_bytes is None else f"{profile.read_bytes / 1e6:.0f}",
        "of the measured bandwidth": "-" if profile.read_share is None else f"{profile.read_share:.1%}",
        "power, W": "-" if profile.power_w is None else f"{profile.power_w:.0f}",
        "energy a token, J": "-" if profile.power_w is None else f"{profile.power_w * step_s:.2f}",
    }


def _parts(profiles: "Sequence[RuntimeProfile]") -> list[tuple[str, ...]]:
    """A row for each part of the step, µs, those that take most anywhere first."""
    times = [{part.group: part.time_s for part in each.parts} for each in profiles]
    groups = sorted({group for each in times for group in each}, key=lambda group: -max(t.get(group, 0) for t in times))
    return [(f"{group}, µs", *(_us(each[group]) if group in each else "-" for each in times)) for group in groups]


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"
