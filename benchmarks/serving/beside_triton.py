"""NVIDIA's Triton with hasten's engine in it beside hasten's own server, in turns, on a CPU or a GPU.

    TRITON_VENV=VENV python benchmarks/serving/beside_triton.py --out FOLDER --model MODEL
    TRITON_VENV=VENV python benchmarks/serving/beside_triton.py --out FOLDER --shape llama-3.1-8b --device cuda
    python benchmarks/serving/beside_triton.py --table FILE

Both load the same model or engine folder and answer the same client: hasten's server over OpenAI's completions and
over generate_stream, Triton over generate_stream. Greedy, end tokens ignored, every prompt drawn anew; the order
of the three changes from round to round, and each round's shares are of its own samples.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from served_setup import SHAPES, write_tokenizer
from servers import Server

from hasten import hardware
from hasten.bench.endpoints import Endpoint, KServeEndpoint, OnlineRequest, OpenAIEndpoint
from hasten.bench.http_stream import Address
from hasten.bench.load import LoadGenerator
from hasten.bench.metrics import has_failed
from hasten.engine.folder import is_engine_folder

sys.path.append(str(Path(__file__).parents[1] / "gpu"))  # whose scripts are no package
gpu_run = importlib.import_module("run")

MODEL = "m"
START_TIMEOUT_S, ANSWER_TIMEOUT_S = 120.0, 120.0
SETTLE_S = 0.5
WARMUP_ROUNDS = 2
WORDS = 400


class Way:
    """One server by one API."""

    def __init__(self, name: str, server: Server, endpoint: Endpoint, generator: LoadGenerator) -> None:
        self.name, self._server, self._endpoint, self._generator = name, server, endpoint, generator

    def measure(self, requests: Sequence[OnlineRequest], concurrency: int) -> dict[str, Any]:
        """Tokens, seconds, and CPU time by process."""
        time.sleep(SETTLE_S)
        before = cpu_s(self._server.process.pid)
        run = self._generator.run(requests, concurrency, ANSWER_TIMEOUT_S)
        used = cpu_s(self._server.process.pid) - before
        failed = [record for record in run.records if has_failed(record)]
        tokens = sum(len(record.token_times_s) for record in run.records)
        if failed or tokens != sum(request.num_tokens for request in requests):
            raise SystemExit(f"{self.name}: {failed[0].error if failed else f'{tokens} tokens came'}")
        seconds = run.end_s - run.start_s
        ttft_ms = [(record.token_times_s[0] - record.submitted_s) * 1e3 for record in run.records]
        return {
            "way": self.name,
            "tokens": tokens,
            "seconds": seconds,
            "ttft_ms": statistics.median(ttft_ms),
            "cpu_s": dict(used) | {"client": run.client_share * seconds},
        }


def cpu_s(pid: int) -> Counter[str]:
    """CPU seconds so far of a process and its descendants, by what they are."""
    used: Counter[str] = Counter()
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            line, times = " ".join(process.cmdline()), process.cpu_times()
            names = ("engine_process", "python_backend_stub", "tritonserver")
            used[next((name for name in names if name in line), "hasten")] += times.user + times.system
    return used


def limits(given: argparse.Namespace) -> tuple[str, ...]:
    return ("--max-num-seqs", str(given.concurrency), "--max-model-tokens", str(given.max_model_tokens))


@contextlib.contextmanager
def started(given: argparse.Namespace, model: Path, logs: Path) -> Iterator[list[Way]]:
    """Both servers, loaded, and a client for each way."""
    engine = () if is_engine_folder(model) else limits(given)
    threads = ("--threads", str(given.threads)) if given.threads else ()
    command = ("-m", "hasten", "serve", str(model), "--device", given.device, "--served-model-name", MODEL)
    with contextlib.ExitStack() as stack:
        own = Server("hasten serve", (*command, *engine, *threads), logs / "hasten.log", "/ready")
        stack.callback(own.close)
        own.wait_until_ready(START_TIMEOUT_S)  # one after the other: each looks at the memory that is free
        triton = Server(
            "tritonserver", (*command, *engine, *threads, "--with", "triton"), logs / "triton.log", "/v2/health/ready"
        )
        stack.callback(triton.close)
        triton.wait_until_ready(START_TIMEOUT_S)
        yield [
            Way(name, server, endpoint, stack.enter_context(LoadGenerator(Address.from_url(server.url), endpoint, 1)))
            for name, server, endpoint in (
                ("hasten, completions", own, OpenAIEndpoint(MODEL)),
                ("hasten, generate_stream", own, KServeEndpoint(MODEL)),
                ("Triton, generate_stream", triton, KServeEndpoint(MODEL)),
            )
        ]


def measure(ways: Sequence[Way], given: argparse.Namespace, results: Any) -> None:
    """Rounds of all ways; what is measured is written after every turn."""
    numbers = itertools.count()
    for index in range(-WARMUP_ROUNDS, given.rounds):
        turn = index % len(ways)
        for way in (*ways[turn:], *ways[:turn]):
            requests = [
                OnlineRequest(str(number), prompt(number, given.prompt_tokens), given.prompt_tokens, given.new_tokens)
                for number in itertools.islice(numbers, given.concurrency * given.waves)
            ]
            sample = {"round": index, **way.measure(requests, given.concurrency)}
            if index >= 0:
                results.add("samples", sample)
            print(f"round {index}, {way.name}: {sample['tokens'] / sample['seconds']:.1f} tokens/s", flush=True)


def prompt(number: int, length: int) -> str:
    """Words that no other prompt begins with; a token each where the model is one of random weights."""
    first = (number // WORDS**place % WORDS for place in range(2))
    words = [*first, *((number * 7 + 31 * index) % WORDS for index in range(length - 2))]
    return " ".join(f"w{word + 4}" for word in words)


def table(values: dict[str, Any]) -> str:
    """As Markdown: medians with their extremes; shares of each round's completions."""
    given = values["given"]
    load = f"{given['concurrency']} clients, {given['prompt_tokens']} words in, {given['new_tokens']} tokens out"
    engine = given["device"] if given["threads"] is None else f"{given['device']}, {given['threads']} threads"
    lines = [f"{values['created_at']}, {values['model']} on {engine}, {load}.", ""]
    lines += ["| way | tokens/s | of hasten's completions | TTFT, ms | CPU time a token, µs |", "|---|---|---|---|---|"]
    by_way: dict[str, list[dict[str, Any]]] = {}
    for sample in values["samples"]:
        by_way.setdefault(sample["way"], []).append(sample)
    first = next(iter(by_way.values()))
    for name, samples in by_way.items():
        speeds = [sample["tokens"] / sample["seconds"] for sample in samples]
        shares = [speed / (base["tokens"] / base["seconds"]) for speed, base in zip(speeds, first, strict=True)]
        processes = {
            process: [each["cpu_s"].get(process, 0.0) / each["tokens"] * 1e6 for each in samples]
            for process in dict.fromkeys(name for each in samples for name in each["cpu_s"])
        }
        cpu = ", ".join(f"{process} {statistics.median(used):.0f}" for process, used in processes.items())
        ttft_ms = statistics.median(sample["ttft_ms"] for sample in samples)
        cells = (name, spread(speeds, "{:.1f}"), spread(shares, "{:.1%}"), f"{ttft_ms:.1f}", cpu)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], form: str) -> str:
    return f"{form.format(statistics.median(values))} ({form.format(min(values))}-{form.format(max(values))})"


@contextlib.contextmanager
def model_folder(given: argparse.Namespace) -> Iterator[Path]:
    """The model that was named, or an engine of one with random weights in a real shape."""
    if given.model is not None:
        yield given.model
        return
    with tempfile.TemporaryDirectory(prefix="hasten-triton-", dir=gpu_run.scratch_folder()) as folder:
        model, engine = Path(folder) / "model", Path(folder) / "engine"
        run([str(SHAPES), given.shape, str(model), given.device])
        write_tokenizer(model, json.loads((model / "config.json").read_text())["vocab_size"])
        build = ["-m", "hasten", "build", str(model), "--scheme", given.scheme, "--device", given.device]
        run([*build, *limits(given), "-o", str(engine)])
        yield engine


def run(command: Sequence[str]) -> None:
    subprocess.run([sys.executable, *command], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the result file and the servers' logs")
    parser.add_argument("--table", type=Path, help="print the results in a file and stop")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", type=Path, help="model or engine folder")
    what.add_argument("--shape", help="of benchmarks/gpu/shapes.py, random weights")
    parser.add_argument("--scheme", default="bf16", help="of an engine in a shape")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of each engine; default as hasten serve's")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--waves", type=int, default=2, help="requests of each client")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--max-model-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    if given.table is not None:
        print(table(json.loads(given.table.read_text())))
        return
    if given.out is None or (given.model is None and given.shape is None):
        parser.error("--table, or --out with --model or --shape is needed")
    now = datetime.datetime.now(datetime.UTC)
    path = given.out / f"triton-{now.strftime('%Y%m%d-%H%M%S')}.json"
    logs = path.with_suffix("")
    logs.mkdir(parents=True)
    facts = {name: getattr(given, name) for name in ("device", "threads", "concurrency", "waves", "prompt_tokens")}
    values = {
        "created_at": now.isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "environment": dataclasses.asdict(hardware.probe(with_bandwidth=False)),
        "model": given.shape or given.model.name,
        "given": facts | {"new_tokens": given.new_tokens, "scheme": given.scheme},
    }
    results = gpu_run.Results(path, values)
    with model_folder(given) as model, started(given, model, logs) as ways:
        measure(ways, given, results)
    print(table(values))


if __name__ == "__main__":
    main()
