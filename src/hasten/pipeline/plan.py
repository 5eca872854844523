"""What `optimize` will do and what it will cost, said before anything starts.

The costs are estimates from the number of weights and the measured memory bandwidth; they
serve to refuse what cannot fit and to say how long it will take, and are never reported as
results.
"""

from dataclasses import dataclass
from pathlib import Path

from hasten.artifact import ModelRef
from hasten.bench.result import Candidate
from hasten.config import SCHEMES, nearest
from hasten.errors import ResourceError, UsageError
from hasten.extras import EXTRAS, is_installed, require
from hasten.hardware import Hardware
from hasten.pipeline.config import OptimizeConfig
from hasten.runtimes.registry import runtime_extra

GIB = 1 << 30
BASELINE_RUNTIME = "transformers"
SCHEMES_BY_RUNTIME = {
    "transformers": ("fp32", "bf16"),
    "native": ("fp32", "bf16", "w8a16", "w4a16"),
    "onnxruntime": ("fp32", "w8a16", "w4a16"),
    "llama_cpp": ("bf16", "w8a16", "w4a16"),
}
PROCESS_BYTES = 450 << 20  # an interpreter with torch and transformers loaded
CONVERTER_BYTES_PER_WEIGHT = 12  # onnxruntime-genai's model builder, measured on 1 B weights
SHARE_OF_BANDWIDTH = {"transformers": 0.35}  # of weight streaming in decode, for the time estimate
SHARE_OF_BANDWIDTH_DEFAULT = 0.7
OPERATIONS_PER_S_PER_CPU = 1e11  # prefill and batched decode, for the time estimate
START_S = 8.0  # a runtime's process: start, load, warm-up


@dataclass(frozen=True)
class PlannedCandidate:
    """One candidate with its estimated cost.

    Args:
        memory_bytes: resident while it runs. prepare_bytes: the most while it is converted.
        disk_bytes: below the run folder.
        run_s: one measured run at each concurrency, in the order of the plan's concurrency.
    """

    candidate: Candidate
    memory_bytes: int
    prepare_bytes: int
    disk_bytes: int
    prepare_s: float
    run_s: tuple[float, ...]

    @property
    def round_s(self) -> float:
        return sum(self.run_s)


@dataclass(frozen=True)
class Plan:
    """The candidates in order, the baseline first, and why others were left out.

    Args:
        groups: names of candidates that are loaded at the same time; each has the baseline.
        left_out: candidate or runtime name to the reason.
        num_rounds: measured rounds that fit the time budget.
    """

    baseline: str
    candidates: tuple[PlannedCandidate, ...]
    groups: tuple[tuple[str, ...], ...]
    left_out: dict[str, str]
    num_rounds: int
    disk_bytes: int
    memory_bytes: int
    time_s: float


def make_plan(config: OptimizeConfig, model: ModelRef, hardware: Hardware) -> Plan:
    """Chooses the candidates and estimates what each costs.

    Raises:
        UsageError: an unknown runtime, or runtimes and schemes that leave nothing to compare.
        MissingExtraError: a runtime was asked for by name and its package is not installed.
    """
    left_out: dict[str, str] = {}
    chosen = _choose(config, left_out)
    costs = tuple(_estimate(candidate, config, model, hardware) for candidate in chosen)
    baseline = costs[0]
    groups = _group(costs, int(hardware.available_memory_bytes * 0.8))
    baseline_extra_s = (len(groups) - 1) * baseline.round_s
    round_s = sum(cost.round_s for cost in costs) + baseline_extra_s
    loaded_bytes = [sum(cost.memory_bytes for cost in costs if cost.candidate.name in group) for group in groups]
    num_rounds = config.runs
    if config.time_budget is not None:
        num_rounds = max(1, min(config.runs, int(config.time_budget / max(round_s, 1e-3)) - config.warmup))
    return Plan(
        baseline=baseline.candidate.name,
        candidates=costs,
        groups=groups,
        left_out=left_out,
        num_rounds=num_rounds,
        disk_bytes=sum(cost.disk_bytes for cost in costs),
        memory_bytes=max(*loaded_bytes, *(cost.prepare_bytes for cost in costs)),
        time_s=sum(cost.prepare_s + 2 * START_S for cost in costs) + round_s * (num_rounds + config.warmup),
    )


def check_resources(plan: Plan, hardware: Hardware, free_disk_bytes: int) -> None:
    """Refuses a plan that this machine cannot carry out.

    Raises:
        ResourceError: too little disk or memory, with both figures and what to leave out.
    """
    if plan.disk_bytes > free_disk_bytes:
        raise ResourceError(
            f"the candidates need {plan.disk_bytes / GIB:.1f} GiB of disk and {free_disk_bytes / GIB:.1f} GiB are "
            "free: leave some out with --schemes or --runtimes, or choose another disk with -o"
        )
    for cost in plan.candidates:
        need = max(cost.memory_bytes, cost.prepare_bytes)
        if need > hardware.available_memory_bytes:
            raise ResourceError(
                f"{cost.candidate.name} needs about {need / GIB:.1f} GiB of memory and "
                f"{hardware.available_memory_bytes / GIB:.1f} GiB are available: "
                f"leave it out with --schemes or --runtimes, or use a smaller model"
            )


def _choose(config: OptimizeConfig, left_out: dict[str, str]) -> list[Candidate]:
    asked_by_name = config.runtimes != OptimizeConfig.runtimes
    for runtime in config.runtimes:
        if runtime not in SCHEMES_BY_RUNTIME:
            raise UsageError(f"unknown runtime {runtime!r}: {nearest(runtime, SCHEMES_BY_RUNTIME)}")
    runtimes = [BASELINE_RUNTIME, *(name for name in config.runtimes if name != BASELINE_RUNTIME)]
    candidates: list[Candidate] = []
    for runtime in runtimes:
        extra = runtime_extra(runtime)
        if extra is not None and not is_installed(extra):
            if asked_by_name:
                require(extra)
            left_out[runtime] = f"not installed: pip install 'hasten[{EXTRAS[extra].name}]'"
            continue
        schemes = [scheme for scheme in config.schemes if scheme in SCHEMES_BY_RUNTIME[runtime]]
        if runtime == BASELINE_RUNTIME and not schemes:
            schemes = [SCHEMES_BY_RUNTIME[runtime][0]]
        candidates += [Candidate(runtime, scheme) for scheme in schemes]
    if len(candidates) < 2:
        raise UsageError("there is nothing to compare: these --runtimes and --schemes leave only the baseline")
    return candidates


def _estimate(candidate: Candidate, config: OptimizeConfig, model: ModelRef, hardware: Hardware) -> PlannedCandidate:
    scheme = SCHEMES[candidate.scheme]
    embedding_parameters = model.num_parameters - model.linear_parameters
    weight_bytes = model.linear_parameters * scheme.weight_bits // 8 + max(embedding_parameters, 0) * 2
    converts = candidate.runtime != BASELINE_RUNTIME
    bandwidth = hardware.read_bandwidth_bytes_per_s or 10e9
    share = SHARE_OF_BANDWIDTH.get(candidate.runtime, SHARE_OF_BANDWIDTH_DEFAULT)
    run_s = []
    for concurrency in config.concurrency:
        operations_s = 2 * model.linear_parameters / (OPERATIONS_PER_S_PER_CPU * hardware.num_cpus)
        prefill_s = concurrency * config.prompt_tokens * operations_s
        step_s = max(weight_bytes / (bandwidth * share), concurrency * operations_s) + 0.002
        run_s.append(prefill_s + config.new_tokens * step_s)
    prepare_bytes = PROCESS_BYTES + weight_bytes
    if candidate.runtime == "onnxruntime":
        prepare_bytes = PROCESS_BYTES + CONVERTER_BYTES_PER_WEIGHT * model.num_parameters
    return PlannedCandidate(
        candidate=candidate,
        memory_bytes=PROCESS_BYTES + weight_bytes,
        prepare_bytes=prepare_bytes if converts else 0,
        disk_bytes=int(weight_bytes * 1.1) if converts else 0,
        prepare_s=(2.0 + model.num_parameters / 2e7) if converts else 0.0,
        run_s=tuple(run_s),
    )


def _group(costs: tuple[PlannedCandidate, ...], budget_bytes: int) -> tuple[tuple[str, ...], ...]:
    """Candidates that fit in memory together; the baseline is in each group, as its yardstick."""
    baseline, others = costs[0], costs[1:]
    groups: list[list[str]] = []
    used_bytes = budget_bytes + 1
    for cost in others:
        if used_bytes + cost.memory_bytes > budget_bytes:
            groups.append([baseline.candidate.name])
            used_bytes = baseline.memory_bytes
        groups[-1].append(cost.candidate.name)
        used_bytes += cost.memory_bytes
    return tuple(tuple(group) for group in groups)


def default_output(model: str) -> Path:
    """runs/NAME, where NAME is the last part of the model's path or id."""
    return Path("runs") / (Path(model).name or "model")
