"""The speed of a run's native engine behind the real server, measured as `bench online` measures any server.

The server is `serve` in a process of its own on a free port of 127.0.0.1, with the limits and threads that
the engine had without it. Each run sends as many requests at once as a run without a server hands over, and
is followed by one without, so that the two compare.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from hasten.bench.metrics import has_failed, median
from hasten.bench.offline import measure
from hasten.bench.result import BenchConfig, BenchResult, BenchRun
from hasten.bench.served import Served
from hasten.bench.workload import PlannedRun
from hasten.errors import HastenError, RuntimeFailedError
from hasten.pipeline.bench_online import bench_online
from hasten.pipeline.config import OnlineConfig, ServeConfig
from hasten.pipeline.measuring import launch, model_tokens
from hasten.pipeline.progress import LOAD_S, Progress, Schedule
from hasten.pipeline.run_folder import RunFolder, read_recommended
from hasten.runtimes.process import how_it_ended

COMMAND = ("-P", "-m", "hasten.pipeline.server_process")
STAGE = "serve"
END_TIMEOUT_S = 10.0
SPIN_S = 0.05  # torch's threads spin for up to 20 ms after their last work, which the other's run must not meet


def measure_served(
    offline: BenchResult,
    run: RunFolder,
    runs: Sequence[PlannedRun],
    max_context_tokens: int,
    time_budget_s: float | None,
    schedule: Schedule,
) -> Served:
    """Starts the server on a run folder, measures it in turns with its engine alone, and ends both.

    Args:
        offline: the native candidate that the folder recommends, measured before; its configuration is taken over.
        runs: those that were planned without a server.
        time_budget_s: for the runs; fewer where it is too short, but at least one at each concurrency.

    Raises:
        HastenError: the server or the engine beside it cannot be started or measured.
        KeyboardInterrupt: also where `bench online` would return what it has.
    """
    recommended = read_recommended(run.path)
    assert recommended is not None and recommended.native is not None, "or there is nothing to serve"
    bench, name = offline.config, offline.candidate.name
    num_runs = num_runs_within(time_budget_s, offline)
    expected_s = 2 * _round_s(offline) * (num_runs + bench.num_warmup)
    schedule.expect("served speed", expected_s)

    def show(progress: Progress) -> None:
        schedule.expect("served speed", min(2 * progress.left_s, expected_s))
        schedule.show(STAGE, f"{name}, {progress.detail}")

    server = _server(run, bench, max_context_tokens)
    artifact, log_path = recommended.native.artifact, run.log_path("without-server")
    with (
        launch(offline.candidate, artifact, bench, max_context_tokens, schedule, log_path) as process,
        running(server, schedule, run.log_path("server")) as url,
        schedule.step(STAGE, "the first request", "served speed"),
    ):
        alone = _Alone(measure({name: process}, runs))
        load = _load(url, recommended.source, bench, num_runs)
        measured = bench_online(load, show, alone.follow)
    if "runs" in measured.missing:
        raise KeyboardInterrupt
    over_http = replace(
        measured,
        candidate=offline.candidate,
        environment=offline.environment,
        config=replace(measured.config, num_threads=bench.num_threads),
        command=_commands(server, load),
    )
    return Served(over_http, replace(offline, runs=tuple(alone.runs)))


class _Alone:
    """The runs without a server, one after each with one.

    Args:
        measuring: makes the next run whenever it is asked for one.
    """

    def __init__(self, measuring: Iterator[tuple[str, BenchRun]]) -> None:
        self.runs: list[BenchRun] = []
        self._measuring = measuring

    def follow(self, served: BenchRun) -> None:
        """Raises RuntimeFailedError if the engine failed."""
        time.sleep(SPIN_S)
        _, run = next(self._measuring)
        time.sleep(SPIN_S)
        if failed := [request for request in run.requests if has_failed(request)]:
            raise RuntimeFailedError(f"the engine without a server failed: {failed[0].error}")
        self.runs.append(run)


def _server(run: RunFolder, bench: BenchConfig, max_context_tokens: int) -> ServeConfig:
    return ServeConfig(
        model=str(run.path),
        port=0,
        device="cuda" if bench.device == "cuda" else "cpu",
        threads=bench.num_threads,
        max_num_seqs=max(bench.concurrency),
        max_model_tokens=model_tokens(bench, max_context_tokens),
        drain_timeout_s=0,
    )


def _load(url: str, source: Path, bench: BenchConfig, num_runs: int) -> OnlineConfig:
    """As many requests at once as a run without a server hands over, of the same lengths."""
    return OnlineConfig(
        url=url,
        tokenizer=source,
        concurrency=bench.concurrency,
        requests=1,
        prompt_tokens=str(bench.prompt_tokens),
        new_tokens=str(bench.new_tokens),
        runs=num_runs,
        warmup=bench.num_warmup,
        seed=bench.seed,
    )


def num_runs_within(time_budget_s: float | None, offline: BenchResult) -> int:
    """Measured runs of both at each concurrency that fit, warm-ups included, if a server does not make them longer."""
    bench = offline.config
    if time_budget_s is None:
        return bench.num_runs
    return max(1, min(bench.num_runs, int(time_budget_s / (2 * _round_s(offline))) - bench.num_warmup))


def _round_s(result: BenchResult) -> float:
    """How long one run at each concurrency takes."""
    return sum(
        median(run.end_s - run.start_s for run in result.runs if run.concurrency == level)
        for level in result.config.concurrency
    )


@contextmanager
def running(config: ServeConfig, schedule: Schedule, log_path: Path) -> Iterator[str]:
    """A server in a process of its own, by its address; the process ends when this one does, however it does.

    An interrupt (Ctrl-C) reaches only this process.

    Raises:
        HastenError: what serving raised, as the class it was.
        RuntimeFailedError: the process died.
    """
    schedule.expect("start server", 2 * LOAD_S)
    ours, theirs = Pipe()
    with ours, log_path.open("wb") as log:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, *COMMAND, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                process_group=0,
            )
        try:
            with schedule.step(STAGE, "starting the server", "start server"):
                address = _start(ours, config, schedule)
            if address is None:
                raise RuntimeFailedError(f"the server {how_it_ended(process.wait(END_TIMEOUT_S))} (log: {log_path})")
            yield address
        finally:
            process.terminate()
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start(pipe: Connection, config: ServeConfig, schedule: Schedule) -> str | None:
    """The address of the server, once it takes requests; None if its process died."""
    pipe.send(config)
    try:
        while isinstance(message := pipe.recv(), Progress):
            schedule.expect("start server", message.left_s)
            schedule.show(STAGE, f"starting the server, {message.detail}")
    except (EOFError, OSError):
        return None
    if isinstance(message, HastenError):
        raise message
    return str(message)


def _commands(server: ServeConfig, load: OnlineConfig) -> str:
    """The command lines that measure the same, in two terminals."""
    serve = ["hasten", "serve", server.model, "--device", server.device, "--threads", str(server.threads)]
    serve += ["--max-num-seqs", str(server.max_num_seqs), "--max-model-tokens", str(server.max_model_tokens)]
    bench = ["hasten", "bench", "online", "http://127.0.0.1:8000", "--tokenizer", str(load.tokenizer)]
    bench += ["--concurrency", ",".join(map(str, load.concurrency)), "--requests", str(load.requests)]
    bench += ["--prompt-tokens", load.prompt_tokens, "--new-tokens", load.new_tokens]
    bench += ["--runs", str(load.runs), "--warmup", str(load.warmup), "--seed", str(load.seed)]
    return f"{shlex.join(serve)} & {shlex.join(bench)}"
