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
from hasten.errors import MissingExtraError, ResourceError, UsageError
from hasten.extras import EXTRAS, check_extra, is_installed, require
from hasten.hardware import Hardware
from hasten.pipeline.config import OptimizeConfig
from hasten.runtimes.registry import runtime_extra

GIB = 1 << 30
BASELINE_RUNTIME = "transformers"
SERVED_RUNTIME = "native"
PROCESS_BYTES = 450 << 20  # an interpreter with torch and transformers loaded
CONVERTER_BYTES_PER_WEIGHT = 12  # onnxruntime-genai's model builder, measured on 1 B weights


@dataclass(frozen=True)
class DevicePlan:
    """What is tried on a device, and the figures behind the estimates there.

    Args:
        schemes: by runtime, those that it may be asked for. defaults: those tried unasked.
        process_bytes: of the device's memory that a loaded runtime takes beside the weights.
        bandwidth_bytes_per_s: where it was not measured.
        share_of_bandwidth: of weight streaming in decode. step_s: a decode step's other work.
        operations_per_s: prefill and batched decode, for each CPU or for the GPU.
        start_s: a runtime's process: start, load, warm-up.
    """

    schemes: dict[str, tuple[str, ...]]
    defaults: dict[str, tuple[str, ...]]
    process_bytes: int
    bandwidth_bytes_per_s: float
    share_of_bandwidth: dict[str, float]
    step_s: dict[str, float]
    operations_per_s: float
    start_s: float


CPU_SCHEMES = {
    "transformers": ("fp32", "bf16"),
    "native": ("fp32", "bf16", "w8a16", "w4a16"),
    "onnxruntime": ("fp32", "w8a16", "w4a16"),
    "llama_cpp": ("bf16", "w8a16", "w4a16"),
}
DEVICE_PLANS = {
    "cpu": DevicePlan(
        schemes=CPU_SCHEMES,
        defaults=CPU_SCHEMES,
        process_bytes=PROCESS_BYTES,
        bandwidth_bytes_per_s=10e9,
        share_of_bandwidth={"transformers": 0.35, "native": 0.7, "onnxruntime": 0.7, "llama_cpp": 0.7},
        step_s={},
        operations_per_s=1e11,
        start_s=8.0,
    ),
    "cuda": DevicePlan(
        schemes={"transformers": ("fp16", "bf16", "fp32"), "native": ("bf16", "w8a16", "fp8", "fp16", "fp32")},
        defaults={"transformers": ("fp16",), "native": ("bf16", "w8a16", "fp8")},
        process_bytes=2 << 30,
        bandwidth_bytes_per_s=1e12,
        share_of_bandwidth={"transformers": 0.6, "native": 0.8},
        step_s={"transformers": 0.02},
        operations_per_s=1e14,
        start_s=30.0,
    ),
}
RUNTIMES_TO_TRY = tuple(CPU_SCHEMES)
OTHER_STEP_S = 0.002


@dataclass(frozen=True)
class PlannedCandidate:
    """One candidate with its estimated cost.

    Args:
        memory_bytes: of the device's memory, taken while it runs.
        prepare_bytes: the most of the computer's memory while it is converted.
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
        left_out: what is not measured, such as a runtime, to the reason.
        num_rounds: measured rounds that fit the time budget.
        served_s: for the best native candidate behind a server; 0 where there will be none.
    """

    baseline: str
    candidates: tuple[PlannedCandidate, ...]
    groups: tuple[tuple[str, ...], ...]
    left_out: dict[str, str]
    num_rounds: int
    served_s: float
    disk_bytes: int
    memory_bytes: int
    time_s: float


def make_plan(config: OptimizeConfig, model: ModelRef, hardware: Hardware, device: str = "cpu") -> Plan:
    """Chooses the candidates and estimates what each costs.

    Raises:
        UsageError: a runtime or scheme that is unknown or not for the device, or nothing to compare is left.
        MissingExtraError: a runtime was asked for by name and its package is not installed.
    """
    left_out: dict[str, str] = {}
    chosen = _choose(config, device, left_out)
    costs = tuple(_estimate(candidate, config, model, hardware, device) for candidate in chosen)
    baseline = costs[0]
    groups = _group(costs, int(device_memory_bytes(hardware, device) * 0.8))
    baseline_extra_s = (len(groups) - 1) * baseline.round_s
    served_round_s = _served_round_s(costs, left_out)
    round_s = sum(cost.round_s for cost in costs) + baseline_extra_s
    loaded_bytes = [sum(cost.memory_bytes for cost in costs if cost.candidate.name in group) for group in groups]
    num_rounds = config.runs
    if config.time_budget is not None:
        rounds_in_budget = int(config.time_budget / max(round_s + (served_round_s or 0.0), 1e-3))
        num_rounds = max(1, min(config.runs, rounds_in_budget - config.warmup))
    start_s = DEVICE_PLANS[device].start_s
    served_s = 0.0 if served_round_s is None else 2 * start_s + served_round_s * (num_rounds + config.warmup)
    return Plan(
        baseline=baseline.candidate.name,
        candidates=costs,
        groups=groups,
        left_out=left_out,
        num_rounds=num_rounds,
        served_s=served_s,
        disk_bytes=sum(cost.disk_bytes for cost in costs),
        memory_bytes=max(*loaded_bytes, *(cost.prepare_bytes for cost in costs)),
        time_s=sum(cost.prepare_s + 2 * start_s for cost in costs) + round_s * (num_rounds + config.warmup) + served_s,
    )


def _served_round_s(costs: tuple[PlannedCandidate, ...], left_out: dict[str, str]) -> float | None:
    """A round of the quickest native candidate with a server and without; None where none will be served."""
    native = [cost.round_s for cost in costs if cost.candidate.runtime == SERVED_RUNTIME]
    if not native:
        return None
    try:
        check_extra("serve")
    except MissingExtraError as error:
        left_out["the served engine"] = str(error)
        return None
    return 2 * min(native)


def device_memory_bytes(hardware: Hardware, device: str) -> int:
    """What is free of the memory that the device computes from; all of a GPU's."""
    if device == "cpu" or not hardware.gpus:
        return hardware.available_memory_bytes
    return hardware.gpus[0].memory_bytes


def check_resources(plan: Plan, hardware: Hardware, free_disk_bytes: int, device: str = "cpu") -> None:
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
        needs = (
            ("memory" if device == "cpu" else "GPU memory", cost.memory_bytes, device_memory_bytes(hardware, device)),
            ("memory", cost.prepare_bytes, hardware.available_memory_bytes),
        )
        for what, need, available in needs:
            if need > available:
                raise ResourceError(
                    f"{cost.candidate.name} needs about {need / GIB:.1f} GiB of {what} and "
                    f"{available / GIB:.1f} GiB are available: "
                    f"leave it out with --schemes or --runtimes, or use a smaller model"
                )


def _choose(config: OptimizeConfig, device: str, left_out: dict[str, str]) -> list[Candidate]:
    asked_by_name = config.runtimes != OptimizeConfig.runtimes
    for runtime in config.runtimes:
        if runtime not in RUNTIMES_TO_TRY:
            raise UsageError(f"unknown runtime {runtime!r}: {nearest(runtime, RUNTIMES_TO_TRY)}")
    allowed, defaults = DEVICE_PLANS[device].schemes, DEVICE_PLANS[device].defaults
    known = tuple(dict.fromkeys(scheme for schemes in allowed.values() for scheme in schemes))
    for scheme in config.schemes or ():
        if scheme not in known:
            raise UsageError(f"scheme {scheme!r} is not for device {device}: {nearest(scheme, known)}")
    runtimes = [BASELINE_RUNTIME, *(name for name in config.runtimes if name != BASELINE_RUNTIME)]
    candidates: list[Candidate] = []
    for runtime in runtimes:
        if runtime not in allowed:
            if asked_by_name:
                raise UsageError(f"the {runtime} runtime runs on the CPU only: leave it out, or add --device cpu")
            left_out[runtime] = "runs on the CPU only: --device cpu has it"
            continue
        extra = runtime_extra(runtime)
        if extra is not None and not is_installed(extra):
            if asked_by_name:
                require(extra)
            left_out[runtime] = f"not installed: pip install 'hasten[{EXTRAS[extra].name}]'"
            continue
        schemes = list(defaults[runtime])
        if config.schemes is not None:
            schemes = [scheme for scheme in config.schemes if scheme in allowed[runtime]]
        if runtime == BASELINE_RUNTIME and not schemes:
            schemes = [allowed[runtime][0]]
        candidates += [Candidate(runtime, scheme) for scheme in schemes]
    if len(candidates) < 2:
        raise UsageError("there is nothing to compare: these --runtimes and --schemes leave only the baseline")
    return candidates


def _estimate(
    candidate: Candidate, config: OptimizeConfig, model: ModelRef, hardware: Hardware, device: str
) -> PlannedCandidate:
    scheme, figures = SCHEMES[candidate.scheme], DEVICE_PLANS[device]
    embedding_parameters = model.num_parameters - model.linear_parameters
    weight_bytes = model.linear_parameters * scheme.weight_bits // 8 + max(embedding_parameters, 0) * 2
    converts = candidate.runtime != BASELINE_RUNTIME
    bandwidth = hardware.read_bandwidth_bytes_per_s or figures.bandwidth_bytes_per_s
    weights_s = weight_bytes / (bandwidth * figures.share_of_bandwidth[candidate.runtime])
    operations_per_s = figures.operations_per_s * (hardware.num_cpus if device == "cpu" else 1)
    run_s = []
    for concurrency in config.concurrency:
        operations_s = 2 * model.linear_parameters / operations_per_s
        prefill_s = concurrency * config.prompt_tokens * operations_s
        step_s = max(weights_s, concurrency * operations_s) + figures.step_s.get(candidate.runtime, OTHER_STEP_S)
        run_s.append(prefill_s + config.new_tokens * step_s)
    prepare_bytes = PROCESS_BYTES + weight_bytes
    if candidate.runtime == "onnxruntime":
        prepare_bytes = PROCESS_BYTES + CONVERTER_BYTES_PER_WEIGHT * model.num_parameters
    return PlannedCandidate(
        candidate=candidate,
        memory_bytes=figures.process_bytes + weight_bytes,
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
