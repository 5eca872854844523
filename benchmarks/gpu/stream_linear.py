"""Times all weight products of a decode step, chained in one CUDA graph as in the engine, and tunes their split.

Random weights in the real shapes, different ones in every layer, so nothing stays in the cache.

    python benchmarks/gpu/stream_linear.py --models llama,qwen --schemes bf16,int8,fp8 --rows 1,8,16 --build
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from hasten.engine.tuning import Tuner
from hasten.kernels.cuda import nvrtc
from hasten.kernels.cuda import stream_linear as module
from hasten.kernels.cuda.product_tuning import product_candidates, stream_configs, time_in_turns
from hasten.kernels.cuda.stream_linear import StreamConfig, stream_linear
from hasten.kernels.product_shape import TUNED_BUCKETS, ProductShape

BANDWIDTH = 4.27e12
"""Bytes a second that one H200 was measured to read."""


@dataclass(frozen=True)
class Model:
    hidden: int
    qkv: int
    middle: int
    layers: int
    vocab: int
    qkv_bias: bool


MODELS = {
    "llama": Model(4096, 6144, 14336, 32, 128256, False),
    "qwen": Model(3584, 4608, 18944, 28, 152064, True),
}
DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
Configs = dict[str, StreamConfig | None]


class Step:
    """The products of one decode step with static buffers; attention is replaced by a view of qkv."""

    def __init__(self, model: Model, scheme: str) -> None:
        self.model, self.dtype = model, DTYPES[scheme]
        shapes = {
            "qkv": (model.qkv, model.hidden),
            "o": (model.hidden, model.hidden),
            "gate_up": (2 * model.middle, model.hidden),
            "down": (model.hidden, model.middle),
        }
        self.layers = [{name: self.make(*shape) for name, shape in shapes.items()} for _ in range(model.layers)]
        self.head = self.make(model.vocab, model.hidden)
        self.matrices = {name: weight for name, (weight, _) in self.layers[0].items()} | {"head": self.head[0]}
        self.norm = torch.rand(model.hidden, device="cuda").to(torch.bfloat16) + 0.5
        self.bias = torch.randn(model.qkv, device="cuda").to(torch.bfloat16) if model.qkv_bias else None
        weights = [weight for layer in self.layers for weight, _ in layer.values()] + [self.head[0]]
        self.bytes = sum(weight.numel() * weight.element_size() for weight in weights)

    def make(self, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.dtype == torch.int8:
            return torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda"), torch.full(
                (n,), 2.7e-4, device="cuda"
            )
        weight = torch.empty(n, k, dtype=torch.bfloat16, device="cuda").normal_()
        if self.dtype == torch.bfloat16:
            return weight.mul_(0.02), None
        return weight.to(self.dtype), torch.full((n,), 0.02, device="cuda")

    def capture(self, rows: int, configs: Configs) -> torch.cuda.CUDAGraph:
        model, bf16 = self.model, torch.bfloat16
        hidden = torch.randn(rows, model.hidden, device="cuda").to(bf16)
        qkv = torch.empty(rows, model.qkv, dtype=bf16, device="cuda")
        attended = qkv.view(-1)[: rows * model.hidden].view(rows, model.hidden)
        middle = torch.empty(rows, model.middle, dtype=bf16, device="cuda")
        logits = torch.empty(rows, model.vocab, device="cuda")

        def product(name: str, layer: int, x: torch.Tensor, out: torch.Tensor, **fused: Any) -> torch.Tensor:
            weight, scale = self.head if name == "head" else self.layers[layer][name]
            return stream_linear(x, weight, scale=scale, out=out, config=configs.get(name), **fused)

        def run() -> None:
            norm = {"norm_weight": self.norm, "eps": 1e-5}
            rows = hidden
            for layer in range(model.layers):
                product("qkv", layer, rows, qkv, bias=self.bias, **norm)
                rows = product("o", layer, attended, hidden, residual=rows)
                product("gate_up", layer, rows, middle, gated=True, **norm)
                rows = product("down", layer, middle, hidden, residual=rows)
            product("head", 0, rows, logits, **norm)

        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph

    def time(self, rows: int, configs: Configs, repeats: int = 15) -> float:
        """Median milliseconds of a step."""
        return time_graph(self.capture(rows, configs), repeats)


def time_graph(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def tune(step: Step, rows: int, deadline: float, log: Callable[[str], None]) -> Configs:
    """The fastest configuration of each matrix in turn, in the whole chain."""
    configs: Configs = {}
    best = step.time(rows, configs)
    for name in ("gate_up", "down", "qkv", "o", "head"):
        for config in variants(step.matrices[name], rows):
            if time.perf_counter() > deadline:
                return configs
            ms = step.time(rows, configs | {name: config})
            log(f"    {rows:2} {name:8} {ms:.3f} {config}")
            if ms < best * 0.998:
                best, configs[name] = ms, config
    return configs


def variants(weight: torch.Tensor, rows: int) -> list[StreamConfig]:
    """More than `candidates`: also other copies in flight and numbers of warps."""
    k, size = weight.shape[1], weight.element_size()
    default = module.default_config(weight, rows)
    changes: list[dict[str, int]] = [{}]
    changes += [{"in_flight_bytes": kib << 10} for kib in (32, 64, 96)]
    changes += [
        {"segment_bytes": 2048},
        {"warps": 4},
        {"segment_bytes": 512, "warps": 4},
    ]
    clusters = [c for c in (1, 2, 4, 8) if default.cluster / 2 <= c <= default.cluster * 2]
    configs = [replace(default, cluster=cluster, **change) for cluster in clusters for change in changes]
    return [config for config in configs if module._fits(k, rows, size, config)]


def sweep(step: Step, rows: int) -> list[str]:
    """Milliseconds of a step with the same settings for all its products, fastest first."""
    found = []
    for in_turns, spread, flight in itertools.product((False, True), (0, 1), (32, 48)):
        configs = {}
        for name, weight in step.matrices.items():
            k, size = weight.shape[1], weight.element_size()
            settings = {"in_turns": in_turns, "in_flight_bytes": flight << 10}
            fitting = [StreamConfig(cluster, **settings) for cluster in (1, 2, 4, 8)]
            fitting = [config for config in fitting if module._fits(k, rows, size, config)]
            if fitting:
                configs[name] = fitting[min(spread, len(fitting) - 1)]
        clusters = "".join(str(config.cluster) for config in configs.values())
        label = f"{'in turns' if in_turns else 'alone'} clusters {clusters} flight {flight}"
        found.append((step.time(rows, configs), label))
    return [f"{ms:.3f} {label}" for ms, label in sorted(found)]


def built(step: Step, rows: int) -> Configs:
    """The configuration of each matrix that `hasten build` chooses. rows: one of TUNED_BUCKETS."""
    tuner = Tuner(time_in_turns)
    dtype = str(step.dtype).removeprefix("torch.")
    for name, weight in step.matrices.items():
        shape = ProductShape(*weight.shape, dtype, rows, name == "gate_up")
        tuner.best(shape.key, product_candidates(shape))
    return {
        name: stream_configs(tuner.choices, weight, name == "gate_up").get(rows)
        for name, weight in step.matrices.items()
    }


def without_overlap(step: Step, rows: int) -> float:
    """Milliseconds of a step whose kernels start only when the one before has ended."""
    launch_config = nvrtc._launch_config
    nvrtc._launch_config = lambda *arguments: launch_config(*arguments[:-1], False)
    try:
        return step.time(rows, {})
    finally:
        nvrtc._launch_config = launch_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama")
    parser.add_argument("--schemes", default="bf16,int8,fp8")
    parser.add_argument("--rows", default="1,8,16")
    parser.add_argument("--sweep", action="store_true", help="one setting changed for all products")
    parser.add_argument("--build", action="store_true", help="each product's split as build tunes it by itself")
    parser.add_argument("--tune", action="store_true", help="each product's fastest split in the whole step")
    parser.add_argument("--budget", type=float, default=200.0, help="seconds after which no variant is tried any more")
    arguments = parser.parse_args()
    deadline = time.perf_counter() + arguments.budget
    table = []
    for model in arguments.models.split(","):
        for scheme in arguments.schemes.split(","):
            step = Step(MODELS[model], scheme)
            limit_ms = step.bytes / BANDWIDTH * 1e3
            for rows in map(int, arguments.rows.split(",")):
                ms, alone_ms = step.time(rows, {}), without_overlap(step, rows)
                line = f"| {model} | {scheme} | {rows} | {limit_ms:.2f} | {alone_ms:.3f} | {ms:.3f} |"
                line += f" {limit_ms / ms:.0%} |"
                if arguments.build and rows in TUNED_BUCKETS:
                    line += f" built: {step.time(rows, built(step, rows)):.3f} |"
                if arguments.sweep:
                    line += "\n    ".join(sweep(step, rows)) + " |"
                if arguments.tune:
                    print(line, flush=True)
                    configs = tune(step, rows, deadline, lambda text: print(text, flush=True))
                    tuned_ms = step.time(rows, configs)
                    line += f" {tuned_ms:.3f} | {limit_ms / tuned_ms:.0%} | {configs} |"
                table.append(line)
                print(line, flush=True)
            del step
            torch.cuda.empty_cache()
    print("| model | weights | rows | limit, ms | without overlap | default, ms | of the limit | tuned, ms | | |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(table))


if __name__ == "__main__":
    main()
