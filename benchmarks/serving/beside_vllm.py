"""hasten over HTTP beside its own engine offline and beside `vllm serve`, in one run on one GPU.

    python benchmarks/serving/beside_vllm.py --out FOLDER --vllm-path SITE --budget-s 490
    python benchmarks/serving/beside_vllm.py --table FILE

A model with random weights in a real shape, the same engine folder offline and served, greedy, end tokens
ignored, every prompt drawn anew. Everything takes turns, in rounds of three parts:

- at each concurrency a batch offline (`hasten bench offline`'s code) and the same load streamed over HTTP
  (`hasten bench online`'s), one request for each client;
- requests of few tokens, one and several at once, for the time to the first one;
- vLLM's own client, `vllm bench serve`, against both servers in a closed loop.

Nothing is measured before vLLM is ready. What is measured is written after every turn, so that a run that is
stopped keeps what it has; `--budget-s` ends it in time.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from served_setup import MAX_NUM_SEQS, MODEL, Setup, prepared
from served_tables import WITHOUT_VLLM, markdown
from servers import ProcessError, Server

from hasten.bench.endpoints import OnlineRequest
from hasten.bench.metrics import has_failed
from hasten.bench.offline import measure
from hasten.bench.result import RequestRecord
from hasten.bench.workload import PlannedRun, PromptDraw
from hasten.errors import HastenError
from hasten.request import Request, SamplingParams

sys.path.append(str(Path(__file__).parents[1] / "gpu"))  # whose scripts are no package
engines, gpu_run = importlib.import_module("engines"), importlib.import_module("run")

PROMPT_TOKENS, NEW_TOKENS = 128, 512
REQUEST_TIMEOUT_S = 120.0
ROUND_S = 120.0  # is left when vLLM is no longer waited for
ALONE_S = 25.0  # is left for what comes after the rounds
IDLE_S = 3.0
SETTLE_S = 2.0  # until nothing of the last turn, or of a process that was killed, is left to be done
COUNTERS = ("prompt_tokens_total", "prefix_cache_hits_total", "num_preemptions_total", "generation_tokens_total")
PACKAGES = ("torch", "transformers", "triton", "fastapi", "uvicorn", "uvloop")


@dataclass(frozen=True)
class Load:
    """`waves` requests of each of `concurrency` clients.

    Beside offline a wave begins when the one before has ended; vLLM's client is a closed loop.
    """

    concurrency: int
    new_tokens: int
    waves: int = 1
    prompt_tokens: int = PROMPT_TOKENS


BATCHES = (*(Load(each, NEW_TOKENS) for each in (1, 2, 4, 8, 64)), Load(MAX_NUM_SEQS, NEW_TOKENS // 2))
FIRST_TOKENS = (Load(1, 8, waves=20), *(Load(each, 8, waves=10) for each in (2, 4, 8)))
CLOSED_LOOPS = (Load(1, NEW_TOKENS, 3), Load(8, NEW_TOKENS, 2), Load(64, NEW_TOKENS, 2))


class OutOfTimeError(Exception):
    """A turn would end after the budget."""


class Run:
    """The turns of one run, and what they found."""

    def __init__(self, setup: Setup, results: Any, end_s: float, scale: int) -> None:
        self._setup, self._results, self._end_s, self._scale = setup, results, end_s, scale
        self._draw = PromptDraw(setup.vocab_size, (), (), PROMPT_TOKENS, seed=0)
        self._took_s: dict[Load, float] = {}

    @property
    def left_s(self) -> float:
        return self._end_s - time.monotonic()

    def warm_up(self) -> None:
        """Short turns of everything, two of each; waits for vLLM between."""
        for load in BATCHES * 2:
            for measured in (self._measure_offline, self._measure_served):
                measured(dataclasses.replace(load, new_tokens=8))
        setup = self._setup
        if setup.vllm is not None and setup.client is not None:
            try:
                setup.vllm.wait_until_ready(self.left_s - ROUND_S)
                self._results.values["versions"] |= setup.client.wait_until_ready(self.left_s - ROUND_S)
                for server in setup.servers:
                    self._measure_client(server, 0, Load(64, 16))
            except ProcessError as error:
                self._note(str(error))
                setup.drop_vllm()
        for server in setup.servers:
            self._results.add("ready", {"server": server.name, "s": server.ready_s})
            gpu_run.say(f"{server.name}: ready after {server.ready_s:.0f} s at most")

    def look_at_idle(self) -> None:
        """Cores that the processes use while nobody asks them anything, and what the GPU does meanwhile."""

        def cpu_s() -> dict[str, float]:
            servers = {server.name: sum(server.cpu_s()) for server in self._setup.servers}
            return servers | {"offline": self._setup.offline.usage().cpu_s}

        time.sleep(SETTLE_S)
        before, began_s = cpu_s(), time.monotonic()
        gpu = []
        while time.monotonic() < began_s + IDLE_S:
            time.sleep(0.5)
            gpu.append(gpu_busy_percent())
        seconds = time.monotonic() - began_s
        cores = {name: (after - before[name]) / seconds for name, after in cpu_s().items()}
        self._results.values["idle"] = {"cores": cores, "gpu_busy_percent": gpu}
        self._results.save()

    def measure_rounds(self, num_rounds: int) -> None:
        """Raises OutOfTimeError when only what comes after has time."""
        setup = self._setup
        for index in range(num_rounds):
            order = slice(None, None, 1 if index % 2 == 0 else -1)
            for load in (*BATCHES, *FIRST_TOKENS):
                for measured in (self._measure_offline, self._measure_served)[order]:
                    self._turn(index, load, measured, ALONE_S)
            for load in CLOSED_LOOPS if setup.vllm is not None else ():
                seed = 1000 * (index + 1) + load.concurrency  # the same prompts for both, and never again
                for server in setup.servers[order]:
                    self._turn(index, load, partial(self._measure_client, server, seed), ALONE_S)

    def measure_without_vllm(self) -> None:
        """Whether vLLM, idle, disturbs the others: a few turns more when it has gone."""
        if self._setup.vllm is None:
            return
        self._setup.drop_vllm()
        time.sleep(SETTLE_S)
        for load in (BATCHES[0], BATCHES[-1]):
            for measured in (self._measure_offline, self._measure_served):
                self._turn(WITHOUT_VLLM, load, measured, 0.0)

    def read_counters(self) -> None:
        """What would explain a figure: nothing may come from the prefix cache, nothing be preempted."""
        self._results.values["counters"] = self._counters()
        self._results.save()

    def _counters(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self._setup.hasten.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {
            name: float(line.split()[-1]) for name in COUNTERS for line in lines if line.startswith(f"hasten:{name}")
        }

    def _turn(self, index: int, load: Load, measured: Callable[[Load], dict[str, Any]], spare_s: float) -> None:
        """One measurement, if there is time for one that takes as long as the longest of its load so far."""
        expected_s = self._took_s.get(load, 0.0)
        name = f"round {index}, {load.concurrency} x {load.waves}"
        if self.left_s < expected_s + spare_s:
            raise OutOfTimeError(f"no time for {name} and what follows")
        scaled = dataclasses.replace(load, new_tokens=max(2, load.new_tokens // self._scale))
        before, began_s = self._counters(), time.monotonic()
        try:
            sample = measured(scaled)
        except (ProcessError, HastenError) as error:
            self._note(f"{name}: {error}")
            return
        self._took_s[load] = max(expected_s, time.monotonic() - began_s)
        sample |= {name: after - before[name] for name, after in self._counters().items()}
        self._results.add("samples", {"round": index, **dataclasses.asdict(scaled), **sample})
        speed, ttft_ms = sample["tokens"] / sample["seconds"], statistics.median(sample["ttft_ms"])
        gpu_run.say(f"{name} {sample['way']}: {speed:.1f} tok/s, TTFT {ttft_ms:.2f} ms")

    def _measure_offline(self, load: Load) -> dict[str, Any]:
        sampling = SamplingParams(max_tokens=load.new_tokens, ignore_eos=True)
        planned = []
        for wave in range(load.waves):
            prompts = [self._draw.draw(load.prompt_tokens) for _ in range(load.concurrency)]
            requests = tuple(Request(f"{wave}-{i}", prompt, sampling) for i, prompt in enumerate(prompts))
            planned.append(PlannedRun(load.concurrency, wave, False, requests))
        runs = [run for _, run in measure({"offline": self._setup.offline}, planned)]
        seconds = sum(run.end_s - run.start_s for run in runs)
        cores = sum(run.cpu_s or 0.0 for run in runs) / seconds
        records = [record for run in runs for record in run.requests]
        return {"way": "offline", **described(records, seconds), "engine_cores": cores}

    def _measure_served(self, load: Load) -> dict[str, Any]:
        waves = [
            [
                OnlineRequest(f"{wave}-{i}", self._draw.draw(load.prompt_tokens), load.prompt_tokens, load.new_tokens)
                for i in range(load.concurrency)
            ]
            for wave in range(load.waves)
        ]
        hasten = self._setup.hasten
        api_s, engine_s = hasten.cpu_s()
        runs = [
            self._setup.generator.run(wave, load.concurrency, min(REQUEST_TIMEOUT_S, self.left_s)) for wave in waves
        ]
        api_end_s, engine_end_s = hasten.cpu_s()
        seconds = sum(run.end_s - run.start_s for run in runs)
        cores = {"api_cores": (api_end_s - api_s) / seconds, "engine_cores": (engine_end_s - engine_s) / seconds}
        records = [record for run in runs for record in run.records]
        client_share = max(run.client_share for run in runs)
        return {"way": "served", **described(records, seconds), **cores, "client_share": client_share}

    def _measure_client(self, server: Server, seed: int, load: Load) -> dict[str, Any]:
        assert self._setup.client is not None
        num_prompts = load.concurrency * load.waves
        command = ["--backend", "openai", "--endpoint", "/v1/completions", "--model", MODEL]
        command += ["--tokenizer", str(self._setup.model), "--host", "127.0.0.1", "--port", str(server.port)]
        command += ["--dataset-name", "random", "--random-input-len", str(load.prompt_tokens)]
        command += ["--random-output-len", str(load.new_tokens), "--ignore-eos", "--temperature", "0"]
        command += ["--request-rate", "inf", "--max-concurrency", str(load.concurrency), "--save-detailed"]
        command += ["--num-prompts", str(num_prompts), "--seed", str(seed), "--disable-tqdm"]
        found = self._setup.client.run(command, min(REQUEST_TIMEOUT_S, self.left_s))
        wanted = num_prompts * load.new_tokens
        if found["total_output_tokens"] != wanted or found["completed"] != num_prompts:
            raise ProcessError(f"{found['total_output_tokens']} tokens came from {server.name}, not {wanted}")
        sample = {"tokens": found.pop("total_output_tokens"), "seconds": found.pop("duration")}
        return {"way": server.name, **sample, "client_cores": found.pop("cpu_s") / sample["seconds"], **found}

    def _note(self, text: str) -> None:
        self._results.add("notes", {"text": text})
        gpu_run.say(f"NOTE {text}")


def described(records: Sequence[RequestRecord], seconds: float) -> dict[str, Any]:
    """Tokens, and what single requests saw. Raises ProcessError where a request failed."""
    failed = [record for record in records if has_failed(record)]
    if failed:
        raise ProcessError(f"{len(failed)} of {len(records)} requests failed: {failed[0].error}")
    times_s = [record.token_times_s for record in records]
    return {
        "tokens": sum(map(len, times_s)),
        "seconds": seconds,
        "ttft_ms": [round((record.token_times_s[0] - record.submitted_s) * 1e3, 3) for record in records],
        "median_tpot_ms": statistics.median((each[-1] - each[0]) / (len(each) - 1) for each in times_s) * 1e3,
    }


def gpu_busy_percent() -> int | None:
    query = ("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits")
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(subprocess.run(query, check=False, capture_output=True, text=True).stdout.split()[0])
    return None


def measure_all(arguments: argparse.Namespace, results: Any) -> None:
    """One run, within the budget."""
    end_s = time.monotonic() + arguments.budget_s
    logs = results.path.with_suffix("")
    logs.mkdir()
    vllm = None
    if arguments.vllm_path is not None or importlib.util.find_spec("vllm") is not None:
        vllm = {"path": arguments.vllm_path, "environment": engines.VLLM_ENVIRONMENT}
    with (
        tempfile.TemporaryDirectory(prefix="hasten-serving-", dir=gpu_run.scratch_folder()) as folder,
        prepared(Path(folder), logs, arguments.shape, arguments.device, vllm, arguments.budget_s) as setup,
    ):
        results.values["steps_s"] = setup.steps_s
        run = Run(setup, results, end_s, arguments.scale)
        try:
            run.warm_up()
            run.look_at_idle()
            with contextlib.suppress(OutOfTimeError):
                run.measure_rounds(arguments.rounds)
            with contextlib.suppress(OutOfTimeError):
                run.measure_without_vllm()
            run.read_counters()
        finally:
            gpu_run.say(markdown(results.values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for results; each run adds a file, and a folder of logs")
    parser.add_argument("--table", type=Path, help="print the results in a file and stop")
    parser.add_argument("--vllm-path", type=Path, help="folder with vLLM's packages; default where Python finds them")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="seconds for everything")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", default="llama-3.1-8b", help="of benchmarks/gpu/shapes.py")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the script itself")
    parser.add_argument("--scale", type=int, default=1, help="divides the tokens to generate, for a quick look")
    arguments = parser.parse_args()
    if arguments.table is not None:
        gpu_run.say(markdown(json.loads(arguments.table.read_text())))
        return
    if arguments.out is None:
        parser.error("--out or --table is needed")
    arguments.out.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    versions = {name: metadata.version(name) for name in PACKAGES}
    results = gpu_run.Results(
        arguments.out / f"serving-{stamp}.json", gpu_run.describe_machine() | {"versions": versions}
    )
    measure_all(arguments, results)


if __name__ == "__main__":
    main()
