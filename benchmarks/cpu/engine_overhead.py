"""Share of a decode step that the native engine spends outside torch's operators.

    pip install py-spy
    python benchmarks/cpu/engine_overhead.py --shape qwen2.5-0.5b --scheme w8a16

Torch releases Python's global lock inside every operator, so the time in which the engine's
thread holds the lock is the time outside operators: the engine's own Python, and the parsing of
the operators' arguments. py-spy samples the thread from another process without stopping it. The
lock is held while an operator's arguments are parsed as well, so the share is an upper bound.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from measure import SHAPES, write_random_model

from hasten import Request, SamplingParams
from hasten.hardware import count_cpus
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.native import NativeRuntime

PROMPT_TOKENS = 128
SAMPLES_PER_S = 137
"""No simple ratio to the steps of about 50 a second: samples would fall on the same places of each."""


def decode(model: Path, scheme: str, seconds: float) -> None:
    """Decodes one request after the other at batch 1 and prints the median step."""
    num_tokens = 64
    config = RuntimeConfig(model, scheme, max_model_tokens=PROMPT_TOKENS + num_tokens, num_threads=count_cpus())
    runtime = NativeRuntime(config)
    steps_s: list[float] = []
    deadline_s = time.perf_counter() + seconds
    while time.perf_counter() < deadline_s:
        first = len(steps_s) + 10
        prompt = tuple(range(first, first + PROMPT_TOKENS))
        request = Request(str(first), prompt, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
        times = [event.time_s for event in runtime.generate([request])]
        steps_s += [after - before for before, after in pairwise(times)]
    print(f"median step {sorted(steps_s)[len(steps_s) // 2] * 1e3:.2f} ms of {len(steps_s)} steps")


def count_samples(pid: int, seconds: float, only_with_lock: bool) -> int:
    """Samples of the engine's step in a recording of a process."""
    with tempfile.NamedTemporaryFile(suffix=".raw") as file:
        command = ["py-spy", "record", "--nonblocking", "--format", "raw", "--output", file.name, "--full-filenames"]
        command += ["--rate", str(SAMPLES_PER_S), "--duration", str(int(seconds)), "--pid", str(pid), "--idle"]
        if only_with_lock:
            command = [each for each in command if each != "--idle"] + ["--gil"]
        subprocess.run(command, check=True, capture_output=True)
        lines = Path(file.name).read_text().splitlines()
    return sum(int(line.rpartition(" ")[2]) for line in lines if "hasten/engine/engine.py" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--scheme", default="w8a16")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--model", type=Path, help="an existing model or engine folder instead of random weights")
    parser.add_argument("--decode-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.decode_only:
        decode(arguments.model, arguments.scheme, arguments.seconds * 2 + 30)
        return
    with tempfile.TemporaryDirectory(prefix="hasten-model-") as folder:
        model = arguments.model or write_random_model(arguments.shape, Path(folder) / f"{arguments.shape}-random")
        options = ["--model", str(model), "--scheme", arguments.scheme, "--seconds", str(arguments.seconds)]
        process = subprocess.Popen([sys.executable, __file__, "--decode-only", *options])
        time.sleep(20)  # load and warm up
        every = count_samples(process.pid, arguments.seconds, only_with_lock=False)
        locked = count_samples(process.pid, arguments.seconds, only_with_lock=True)
        process.wait()
    print(f"{arguments.shape} {arguments.scheme}: {locked} of {every} samples outside operators, {locked / every:.1%}")


if __name__ == "__main__":
    main()
