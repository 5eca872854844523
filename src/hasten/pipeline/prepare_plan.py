"""Looks at the model and the machine and plans a run of `optimize`, before anything is written."""

from dataclasses import dataclass
from pathlib import Path

from hasten.artifact import ModelRef, inspect
from hasten.bench.result import BenchConfig
from hasten.hardware import Hardware, free_disk_bytes
from hasten.hub import resolve_model
from hasten.models.config import DecoderConfig
from hasten.models.weights import check_weights
from hasten.pipeline.config import OptimizeConfig
from hasten.pipeline.device import probe_for, resolve_device
from hasten.pipeline.doctor import Check, check_conditions
from hasten.pipeline.measuring import bench_config, check_length
from hasten.pipeline.plan import Plan, check_resources, default_output, make_plan


@dataclass(frozen=True)
class PreparedPlan:
    """A plan with what it was made from; nothing has been written yet.

    Args:
        checks: what `doctor` says about the conditions for measuring.
    """

    config: OptimizeConfig
    checks: tuple[Check, ...]
    model: ModelRef
    max_context_tokens: int
    hardware: Hardware
    bench: BenchConfig
    plan: Plan
    run_path: Path


def prepare_plan(config: OptimizeConfig) -> PreparedPlan:
    """Looks at the model and the machine and plans the run.

    Raises:
        ModelError: the model cannot be used.
        RequestError: prompt and output are longer than the model's context.
        UsageError: options that leave nothing to do. ResourceError: it does not fit this machine.
    """
    model = inspect(resolve_model(config.model))
    decoder = DecoderConfig.from_hf(model.config)
    check_weights(model, decoder)
    max_context_tokens = decoder.max_context_tokens
    check_length(config, max_context_tokens)
    device = resolve_device(config.device)
    hardware = probe_for(device)
    run_path = config.output or default_output(model.name)
    plan = make_plan(config, model, hardware, device)
    check_resources(plan, hardware, free_disk_bytes(run_path), device)
    bench = bench_config(config, plan.num_rounds, device)
    checks = check_conditions(hardware, run_path)
    return PreparedPlan(config, checks, model, max_context_tokens, hardware, bench, plan, run_path)
