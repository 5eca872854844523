"""Times choosing the tokens of a decode step on the GPU, as replays of a CUDA graph, and in torch for comparison.

Random logits of a sharp (scale 3) and a flat (scale 0.3) distribution. A few rows stay in the L2
cache between replays, as they are there when the engine's output projection has just written them.

    python benchmarks/gpu/sampling.py --rows 1,8,64,256 --vocab-size 128256
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from hasten.engine.sampler import sample
from hasten.engine.sequence import make_sequences
from hasten.kernels.cuda.sample import GreedyWorkspace, SamplingState, Tiling, greedy_rows, sample_rows
from hasten.request import Request, SamplingParams

CASES = {
    "greedy, penalties": (3.0, SamplingParams(presence_penalty=1e-3)),
    "temperature": (3.0, SamplingParams(temperature=0.8)),
    "top-k 50": (3.0, SamplingParams(temperature=0.8, top_k=50)),
    "top-p 0.9": (3.0, SamplingParams(temperature=0.8, top_p=0.9)),
    "top-p 0.9, flat": (0.3, SamplingParams(temperature=1.0, top_p=0.9)),
    "top-k 50, top-p 0.9": (3.0, SamplingParams(temperature=0.8, top_k=50, top_p=0.9)),
    "all": (3.0, SamplingParams(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, presence_penalty=1e-3)),
}


def graph_us(run: Callable[[], None], calls: int = 20, repeats: int = 15) -> float:
    """Median time of one call in a graph of `calls`."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return eager_us(graph.replay, repeats) / calls


def eager_us(run: Callable[[], object], repeats: int = 15) -> float:
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[2:])


def time_greedy(rows: int, vocab_size: int, tile: int) -> float:
    logits = torch.randn(rows, vocab_size, device="cuda")
    out = torch.empty(rows, dtype=torch.int64, device="cuda")
    workspace = GreedyWorkspace(rows, "cuda", Tiling(greedy_tile=tile))
    return graph_us(lambda: greedy_rows(logits, out, workspace))


def time_sampling(rows: int, vocab_size: int, scale: float, sampling: SamplingParams, tiling: Tiling) -> float:
    logits = torch.randn(rows, vocab_size, device="cuda") * scale
    out = torch.empty(rows, dtype=torch.int64, device="cuda")
    state = SamplingState(rows, vocab_size, "cuda", tiling=tiling)
    state.set_slots(list(range(rows)), [sampling] * rows, [list(range(500))] * rows, [list(range(400, 600))] * rows)
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    uniforms = torch.rand(rows, dtype=torch.float64, device="cuda")
    return graph_us(lambda: sample_rows(logits, slots, uniforms, state, out))


def time_torch(rows: int, vocab_size: int, scale: float, sampling: SamplingParams) -> float:
    logits = torch.randn(rows, vocab_size, device="cuda") * scale
    sequences = [make_sequences(Request("r", tuple(range(500)), sampling), 0, (), 1000)[0] for _ in range(rows)]
    return eager_us(lambda: sample(logits, sequences), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,64,256")
    parser.add_argument("--vocab-size", type=int, default=128256)
    parser.add_argument("--tiles", default="2048", help="tiles of the sampler to try")
    parser.add_argument("--greedy-tiles", default="4096", help="tiles of greedy_rows to try")
    parser.add_argument("--torch", action="store_true", help="time the sampler in torch as well")
    options = parser.parse_args()
    rows = [int(each) for each in options.rows.split(",")]
    print(f"microseconds a call, vocabulary {options.vocab_size}, {torch.cuda.get_device_name()}")
    print(f"{'case':34}" + "".join(f"{each:>9}" for each in rows) + "  rows")
    for tile in map(int, options.greedy_tiles.split(",")):
        times = [time_greedy(each, options.vocab_size, tile) for each in rows]
        print(f"{f'greedy_rows, tile {tile}':34}" + "".join(f"{each:9.1f}" for each in times), flush=True)
    for name, (scale, sampling) in CASES.items():
        for tile in map(int, options.tiles.split(",")):
            tiling = Tiling(tile=tile)
            times = [time_sampling(each, options.vocab_size, scale, sampling, tiling) for each in rows]
            print(f"{f'{name}, tile {tile}':34}" + "".join(f"{each:9.1f}" for each in times), flush=True)
        if options.torch:
            times = [time_torch(each, options.vocab_size, scale, sampling) for each in rows]
            print(f"{f'{name}, torch':34}" + "".join(f"{each:9.1f}" for each in times), flush=True)


if __name__ == "__main__":
    main()
