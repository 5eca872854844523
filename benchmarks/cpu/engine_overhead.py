"""Share of a decode step that the native engine spends outside torch's operators.

    python benchmarks/cpu/engine_overhead.py --shape qwen2.5-0.5b --scheme w8a16

The operator calls of one step are recorded, with their arguments. Then steps and replays of that
record take turns: a replay is the same calls on the same tensors in one loop, so what a step takes
longer is the engine's own Python. A call's way into torch and back counts as the operator's.

Prints the median of 1 - replay / step over all turns, and its quartiles: a shared machine disturbs
single steps by more than is measured here, so read it on one that is quiet.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import SHAPES, write_random_model
from torch.overrides import TorchFunctionMode

from hasten import Request, SamplingParams
from hasten.bench.metrics import spread
from hasten.hardware import count_cpus
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.native import NativeRuntime

PROMPT_TOKENS = 128
FIRST_STEPS = 10  # not measured: the prompt, and fresh memory


class Recorder(TorchFunctionMode):
    """Notes every call of torch's functions; reading an attribute of a tensor is no operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict[str, Any]]] = []

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") != "__get__":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def measure(model: Path, scheme: str, num_turns: int) -> None:
    """Decodes one request and prints what its steps and the replays between them take."""
    num_tokens = FIRST_STEPS + num_turns + 2
    config = RuntimeConfig(model, scheme, max_model_tokens=PROMPT_TOKENS + num_tokens, num_threads=count_cpus())
    runtime = NativeRuntime(config)
    prompt = tuple(range(10, 10 + PROMPT_TOKENS))
    runtime.submit(Request("decode", prompt, SamplingParams(max_tokens=num_tokens, ignore_eos=True)))
    for _ in range(FIRST_STEPS):
        runtime.step()
    with Recorder() as recorder:
        runtime.step()
    steps_s, replays_s = [], []
    with torch.inference_mode():
        for _ in range(num_turns):
            start_s = time.perf_counter()
            runtime.step()
            between_s = time.perf_counter()
            for function, args, kwargs in recorder.calls:
                function(*args, **kwargs)
            end_s = time.perf_counter()
            steps_s.append(between_s - start_s)
            replays_s.append(end_s - between_s)
    outside = spread([1 - replay_s / step_s for step_s, replay_s in zip(steps_s, replays_s, strict=True)])
    print(
        f"{scheme}: {len(recorder.calls)} operator calls a step of {spread(steps_s).median * 1e3:.2f} ms, replayed in "
        f"{spread(replays_s).median * 1e3:.2f} ms: {outside.median:.1%} outside operators "
        f"({outside.low:.1%} to {outside.high:.1%}, {num_turns} turns)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--scheme", default="w8a16")
    parser.add_argument("--turns", type=int, default=400)
    parser.add_argument("--model", type=Path, help="an existing model or engine folder instead of random weights")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hasten-model-") as folder:
        model = arguments.model or write_random_model(arguments.shape, Path(folder) / f"{arguments.shape}-random")
        measure(model, arguments.scheme, arguments.turns)


if __name__ == "__main__":
    main()
