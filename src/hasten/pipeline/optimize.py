"""The main job: plan, prepare, quality, speed, profile, gate, pick, serve, report.

Each stage writes what it found before the next begins, so an interrupted run goes on from
there. A candidate that fails is recorded with its reason and does not stop the others; only
the baseline must work, because everything is judged against it. A server that fails is reported
and changes nothing else.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hasten.bench.offline import Progress as Measuring
from hasten.bench.offline import measure
from hasten.bench.pick import Decision, best_of_runtime, decide
from hasten.bench.result import BenchResult, Footprint, Memory, ProfileResult
from hasten.bench.served import Served
from hasten.errors import HastenError, RuntimeFailedError
from hasten.evaluate.quality import Reference, evaluate, evaluate_baseline
from hasten.pipeline.config import OptimizeConfig
from hasten.pipeline.describe import command_line, folder_bytes
from hasten.pipeline.measuring import launch, make_yardstick
from hasten.pipeline.plan import BASELINE_RUNTIME, SERVED_RUNTIME
from hasten.pipeline.prepare_plan import PreparedPlan, prepare_plan
from hasten.pipeline.progress import LOAD_S, OnProgress, Schedule, silent
from hasten.pipeline.run_folder import Kept, RunFolder, open_run_folder, read_recommended
from hasten.pipeline.run_results import RunResults
from hasten.pipeline.served_speed import measure_served
from hasten.profiling.decode import profile_decode
from hasten.profiling.gpu_decode import profile_gpu_decode
from hasten.report.savings import Prices
from hasten.report.write import write_report
from hasten.runtimes.process import RuntimeProcess
from hasten.runtimes.registry import runtime_class

# expected seconds of the steps whose length hardly depends on the model
QUALITY_S, PROFILE_S, REPORT_S = 8.0, 3.0, 8.0


@dataclass(frozen=True)
class Outcome:
    """What `optimize` found.

    Args:
        results: in the order of the plan, the baseline first.
        served: the best native candidate behind a server; None where none is to be served.
    """

    run_path: Path
    results: tuple[BenchResult, ...]
    decision: Decision
    served: Served | None


def optimize(config: OptimizeConfig, on_progress: OnProgress = silent) -> Outcome:
    """The whole chain: plans, measures, judges, reports; goes on where an interrupted run was.

    Raises:
        HastenError: what `prepare_plan` and `carry_out` raise.
    """
    return carry_out(prepare_plan(config), on_progress)


def carry_out(prepared: PreparedPlan, on_progress: OnProgress = silent) -> Outcome:
    """Carries out a plan, or what an interrupted run left of it, and writes the run folder.

    Raises:
        UsageError: the run folder holds something else.
        RuntimeFailedError: the baseline cannot be measured, so nothing can be compared.
    """
    optimization = _Optimization(prepared, on_progress)
    optimization.prepare()
    for index, group in enumerate(prepared.plan.groups):
        optimization.measure_group(index, group)
    return optimization.conclude()


class _Optimization:
    """The stages of one run of `optimize`, and what they hand to each other."""

    def __init__(self, prepared: PreparedPlan, on_progress: OnProgress) -> None:
        self._prepared = prepared
        self._plan = prepared.plan
        self._planned = {cost.candidate.name: cost for cost in self._plan.candidates}
        self._yardstick = make_yardstick(prepared.model, prepared.bench, prepared.max_context_tokens)
        self._run = _open(prepared)
        self._results = RunResults(prepared, self._yardstick.runs, self._run)
        self._artifacts: dict[str, Path] = {}
        self._reference: Reference | None = None
        self._speed_s = 0.0  # spent on measuring speed
        self._schedule = Schedule(on_progress)
        self._expect_steps()

    def prepare(self) -> None:
        """Converts the model for each runtime that wants it in a form of its own."""
        for name in self._planned:
            if self._results.has_work(name) or name == self._plan.baseline:
                self._attempt(name, self._prepare)

    def measure_group(self, index: int, names: Sequence[str]) -> None:
        """Quality, speed and profile of candidates that are loaded at the same time."""
        with ExitStack() as stack:
            processes: dict[str, RuntimeProcess] = {}
            if any(self._results.has_work_in(name, index) for name in names[1:]):
                for name in names:
                    if name in self._artifacts:
                        self._attempt(name, self._load, processes, stack)
            for name, process in tuple(processes.items()):
                if not self._attempt(name, self._judge_quality, process):
                    del processes[name]
            self._measure_speed(index, processes)
            for name, process in processes.items():
                if self._results[name].failure is None:
                    self._attempt(name, self._profile, process)

    def conclude(self) -> Outcome:
        """Judges, picks, keeps what is recommended, serves it, and reports."""
        results = tuple(self._results.values())
        decision = decide(results, self._plan.baseline, self._prepared.config.gate)
        native = best_of_runtime(results, decision, SERVED_RUNTIME)
        self._keep(decision, native)
        served = self._serve(native)
        with self._schedule.step("report", "tables and pictures"):
            config = self._prepared.config
            prices = Prices(config.price_per_hour, load_tokens_per_s=config.load)
            write_report(results, decision, self._run.path, prices, served)
        return Outcome(self._run.path, results, decision, served)

    def _expect_steps(self) -> None:
        for name, cost in self._planned.items():
            result = self._results[name]
            self._schedule.expect(f"prepare {name}", cost.prepare_s if result.footprint is None else 0.0)
            if self._results.has_work(name):
                self._schedule.expect(f"load {name}", LOAD_S)
                self._schedule.expect(f"quality {name}", QUALITY_S if result.quality is None else 0.0)
                self._schedule.expect(f"profile {name}", PROFILE_S)
        for index in range(len(self._plan.groups)):
            self._schedule.expect(f"speed {index}", self._results.expected_speed_s(index))
        self._schedule.expect("served speed", 0.0 if self._run.read_served() else self._plan.served_s)
        self._schedule.expect("report", REPORT_S)

    def _attempt(self, name: str, stage: Callable[..., object], *arguments: object) -> bool:
        """Runs a stage of one candidate; a failure ends that candidate, and all if it is the baseline."""
        try:
            stage(name, *arguments)
        except HastenError as error:
            self._results.update(name, failure=str(error))
            for kind in ("prepare", "load", "quality", "profile"):
                self._schedule.expect(f"{kind} {name}", 0.0)
            if name == self._plan.baseline:
                raise RuntimeFailedError(f"the baseline {name} failed, so nothing can be compared: {error}") from error
            return False
        return True

    def _prepare(self, name: str) -> None:
        candidate, out = self._planned[name].candidate, self._run.candidate_path(name)
        if candidate.runtime == BASELINE_RUNTIME:
            self._artifacts[name] = self._prepared.model.path
            return
        if self._results[name].footprint is not None and out.is_dir():
            self._artifacts[name] = out
            return
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        start_s = time.perf_counter()
        with self._schedule.loading(name, "prepare", "converting the model") as on_loading:
            self._artifacts[name] = runtime_class(candidate.runtime).prepare(
                self._prepared.model.path, candidate.scheme, out, self._prepared.bench.device, on_loading
            )
        self._results.update(
            name, footprint=Footprint(folder_bytes(out), None, time.perf_counter() - start_s, load_s=0.0)
        )

    def _load(self, name: str, processes: dict[str, RuntimeProcess], stack: ExitStack) -> None:
        prepared = self._prepared
        artifact, log_path = self._artifacts[name], self._run.log_path(name)
        candidate = self._planned[name].candidate
        process = stack.enter_context(
            launch(candidate, artifact, prepared.bench, prepared.max_context_tokens, self._schedule, log_path)
        )
        usage, earlier = process.usage(), self._results[name].footprint
        footprint = Footprint(
            disk_bytes=folder_bytes(artifact),
            weight_bytes_per_token=process.weight_bytes_per_token,
            prepare_s=earlier.prepare_s if earlier is not None else 0.0,
            load_s=process.load_s,
        )
        self._results.update(name, footprint=footprint, memory=Memory(usage.rss_bytes, usage.peak_rss_bytes))
        processes[name] = process

    def _judge_quality(self, name: str, process: RuntimeProcess) -> None:
        material, known = self._yardstick.material, self._results[name].quality
        if name == self._plan.baseline:
            if self._reference is None and self._results.is_quality_missing:
                num_tokens = known.num_tokens if known is not None else None
                with self._schedule.step("quality", f"{name}, held-out text", f"quality {name}"):
                    quality, self._reference = evaluate_baseline(
                        process, material, self._run.scratch_path, num_tokens=num_tokens
                    )
                self._results.update(name, quality=quality)
        elif known is None:
            assert self._reference is not None, "the baseline comes first"
            with self._schedule.step("quality", f"{name}, held-out text", f"quality {name}"):
                self._results.update(name, quality=evaluate(process, material, self._reference))

    def _measure_speed(self, index: int, processes: Mapping[str, RuntimeProcess]) -> None:
        for process in processes.values():
            process.reset_peak()  # scoring whole windows takes memory that serving does not
            process.peak_device_bytes(reset=True)
        kind = f"speed {index}"

        def show(measuring: Measuring) -> None:
            if measuring.remaining_s is not None:
                self._schedule.expect(kind, measuring.remaining_s)
            self._schedule.show("speed", f"{measuring.candidate}, run {measuring.num_done} of {measuring.num_total}")

        start_s = time.perf_counter()
        with self._schedule.step("speed", "warming up", kind):
            for name, run in measure(
                processes,
                self._results.runs_of_group(index),
                done={name: self._results[name].runs for name in processes},
                time_budget_s=self._prepared.config.time_budget,
                on_progress=show,
            ):
                failure = next((request.error for request in run.requests if request.error is not None), None)
                self._results.update(name, runs=(*self._results[name].runs, run), failure=failure)
        self._speed_s += time.perf_counter() - start_s
        for name, process in processes.items():
            if self._results[name].failure is None:
                self._attempt(name, self._note_peak, process)

    def _note_peak(self, name: str, process: RuntimeProcess) -> None:
        memory = self._results[name].memory
        assert memory is not None, "noted when it was loaded"
        peak_bytes = max(memory.peak_rss_bytes, process.usage().peak_rss_bytes)
        self._results.update(
            name,
            memory=dataclasses.replace(
                memory, peak_rss_bytes=peak_bytes, peak_device_bytes=process.peak_device_bytes()
            ),
        )

    def _profile(self, name: str, process: RuntimeProcess) -> None:
        if self._results[name].profile is None:
            with self._schedule.step("profile", f"{name}, operators of a decode step", f"profile {name}"):
                profile = self._profile_decode(name, process)
            missing = {} if profile is not None else {"profile": "this runtime does not tell its operators' times"}
            self._results.update(name, profile=profile, missing=self._results[name].missing | missing)

    def _profile_decode(self, name: str, process: RuntimeProcess) -> ProfileResult | None:
        prompt = self._yardstick.material.prompts[0]
        bandwidth = self._prepared.hardware.read_bandwidth_bytes_per_s
        if self._prepared.bench.device == "cpu":
            return profile_decode(process, prompt, bandwidth)
        decode = profile_gpu_decode(process, prompt, self._run.scratch_path / f"{name}.trace.json.gz")
        return None if decode is None else decode.result(process.weight_bytes_per_token, bandwidth)

    def _keep(self, decision: Decision, native: str | None) -> None:
        """Keeps the winner and the best native candidate, and removes what the others were converted to."""
        if decision.pick is not None:
            winner = self._kept(decision.pick, decision)
            self._run.recommend(winner, self._kept(native, decision) if native else None, self._prepared.model.path)
        self._run.clean()

    def _kept(self, name: str, decision: Decision) -> Kept:
        """An eligible candidate with its folder: where an earlier run kept it, else as it was converted."""
        candidate, known = self._planned[name].candidate, read_recommended(self._run.path)
        speedup = next(verdict.speedup for verdict in decision.verdicts if verdict.candidate == name)
        assert speedup is not None, "what is eligible has one"
        for kept in () if known is None else (known.winner, known.native):
            if kept is not None and kept.candidate == candidate and kept.artifact.exists():
                return dataclasses.replace(kept, speedup=speedup)
        self._prepare(name)
        return Kept(candidate, speedup, self._artifacts[name])

    def _serve(self, name: str | None) -> Served | None:
        """The kept native candidate behind a server, measured unless it was."""
        if name is None or not self._plan.served_s:
            self._run.forget_served()
            return None
        offline, known = self._results[name], self._run.read_served()
        if known is not None and known.over_http.failure is None and known.over_http.candidate == offline.candidate:
            return known
        budget_s, max_context_tokens = self._prepared.config.time_budget, self._prepared.max_context_tokens
        left_s = None if budget_s is None else budget_s - self._speed_s
        try:
            served = measure_served(
                offline, self._run, self._yardstick.runs, max_context_tokens, left_s, self._schedule
            )
        except HastenError as error:
            failed = dataclasses.replace(offline, runs=(), profile=None, memory=None, missing={}, failure=str(error))
            served = Served(failed, offline)
        self._run.write_served(served)
        return served


def _open(prepared: PreparedPlan) -> RunFolder:
    """The run folder, new or resumed; what must be equal for samples to belong together is its identity."""
    bench = dataclasses.asdict(prepared.bench)
    del bench["num_runs"], bench["num_warmup"]  # more or fewer of the same kind
    machine = {"cpu": prepared.hardware.cpu, "gpus": [gpu.name for gpu in prepared.hardware.gpus]}
    identity = {"model": prepared.model.revision, **machine, **bench}
    details = {
        "gate": dataclasses.asdict(prepared.config.gate),
        "config": dataclasses.asdict(prepared.config),
        "plan": dataclasses.asdict(prepared.plan),
    }
    run = open_run_folder(prepared.run_path, identity, details)
    run.write_reproduce(command_line())
    return run
