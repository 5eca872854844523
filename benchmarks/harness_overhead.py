"""What hasten's own measuring costs, measured with a runtime that does nothing.

The fake runtime looks its next token up, so nearly all the time in its runs is the harness's:
handing requests to another process and bringing events back. Two identical candidates run in
turns; a difference between them is noise.

    python benchmarks/harness_overhead.py
"""

import tempfile
from pathlib import Path

from hasten.bench.metrics import median, tpot_s, ttft_s
from hasten.bench.offline import measure
from hasten.bench.result import BenchConfig, BenchRun
from hasten.bench.workload import sample_requests
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.process import RuntimeProcess

CONFIG = BenchConfig(128, 64, (1, 8), num_runs=50, num_warmup=3, num_threads=1, seed=0)
VOCAB_SIZE = 32000


def main() -> None:
    runs: dict[str, list[BenchRun]] = {"first": [], "second": []}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(f'{{"vocab_size": {VOCAB_SIZE}}}')
        processes = {name: RuntimeProcess("fake", RuntimeConfig(Path(folder), "fp32")) for name in runs}
        for name, run in measure(processes, sample_requests(CONFIG, VOCAB_SIZE)):
            runs[name].append(run)
        for process in processes.values():
            process.close()
    print("| candidate | concurrency | TTFT, µs | a token, µs | last token to return, µs |")
    print("|---|---|---|---|---|")
    for name, of_candidate in runs.items():
        for concurrency in CONFIG.concurrency:
            print(f"| {name} | {concurrency} | {describe([r for r in of_candidate if r.concurrency == concurrency])} |")


def describe(runs: list[BenchRun]) -> str:
    requests = [request for run in runs for request in run.requests]
    ttft = median(ttft_s(request) for request in requests)
    # one token of every request comes in a step
    token = median((tpot_s(request) or 0.0) / len(run.requests) for run in runs for request in run.requests)
    drain = median(run.end_s - max(request.token_times_s[-1] for request in run.requests) for run in runs)
    return " | ".join(f"{value * 1e6:.0f}" for value in (ttft, token, drain))


if __name__ == "__main__":
    main()
