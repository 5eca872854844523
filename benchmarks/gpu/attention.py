"""Times attention and the elementwise kernels of one layer on one GPU, against the bytes that they must move.

    python benchmarks/gpu/attention.py

Launches are chained in a CUDA graph, each with a layer's own cache, together larger than the
L2 cache; figures are the median microseconds a launch. Values are checked by tests/gpu.
"""

import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch

from hasten.kernels.cuda import elementwise, rotary
from hasten.kernels.cuda.decode_attention import DecodeWorkspace, decode_attention
from hasten.kernels.cuda.prompt_attention import prompt_attention
from hasten.kernels.cuda.ragged_attention import attention_tiles, ragged_attention

BLOCK_SIZE = 16
SHAPES = {"Llama-3.1-8B": (32, 8, 128), "Qwen2.5-7B": (28, 4, 128)}
DECODES = [(1, 128), (1, 512), (1, 4096), (1, 32768), (8, 512), (8, 8192), (64, 640), (256, 640)]
PROMPTS = [
    *(((tokens,), 0) for tokens in (128, 512, 2048, 8192)),
    ((128,) * 4, 0),
    ((2048,) * 4, 0),
    ((200,), 1024),
    ((512,), 8192),
]
"""Tokens of the prompts in a step, and those before them in the cache."""

CHAIN_BYTES = 1.2e9


def median_us(chain: Callable[[], object], launches: int) -> float:
    """A launch's share of a replayed graph of the chain."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times[2:])


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy of 4 GB."""
    x = torch.empty(1 << 31, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_us(lambda: y.copy_(x), 1) * 1e6


def time_decode(heads: int, kv_heads: int, head_dim: int, rows: int, context: int) -> tuple[float, float]:
    """Microseconds a launch, and bytes of the cache that it reads."""
    num_bytes = rows * context * kv_heads * head_dim * 4
    layers = max(4, min(64, int(CHAIN_BYTES // num_bytes)))
    blocks = context // BLOCK_SIZE + 1
    with torch.device("cuda"):
        shape = (rows * blocks, BLOCK_SIZE, kv_heads, head_dim)
        caches = [[torch.empty(shape, dtype=torch.bfloat16).normal_() for _ in range(2)] for _ in range(layers)]
        tables = torch.randperm(rows * blocks).view(rows, blocks).int()
        angles = torch.randn(context, head_dim // 2)
        qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim).bfloat16()
        slots = torch.arange(rows, dtype=torch.int32)
        positions = torch.full((rows,), context - 1, dtype=torch.int32)
        out = torch.empty(rows, heads * head_dim, dtype=torch.bfloat16)
    cos, sin, workspace = angles.cos(), angles.sin(), DecodeWorkspace(rows, heads, head_dim, "cuda")

    def chain() -> None:
        for keys, values in caches:
            decode_attention(
                qkv,
                cos,
                sin,
                keys,
                values,
                tables,
                slots,
                positions,
                num_heads=heads,
                num_kv_heads=kv_heads,
                scale=head_dim**-0.5,
                workspace=workspace,
                out=out,
                is_early=True,
            )

    return median_us(chain, layers), num_bytes


def time_prompts(heads: int, kv_heads: int, head_dim: int, lengths: Sequence[int], context: int) -> dict[str, float]:
    """Microseconds a layer, by kernel, for prompts of which as many tokens are in the cache before the step."""
    layers, counts = 8, np.array(lengths)
    num_blocks = -(-(max(lengths) + context) // BLOCK_SIZE)
    with torch.device("cuda"):
        inputs = [
            [torch.randn(sum(lengths), count, head_dim).bfloat16() for count in (heads, kv_heads, kv_heads)]
            for _ in range(layers)
        ]
        shape = (len(lengths) * num_blocks, BLOCK_SIZE, kv_heads, head_dim)
        caches = [[torch.randn(shape).bfloat16() for _ in range(2)] for _ in range(layers)]
        tables = torch.randperm(shape[0]).view(len(lengths), num_blocks).int()
    positions = np.full(len(lengths), context)
    tiles = attention_tiles(counts.cumsum() - counts, counts, np.arange(len(lengths)), positions, heads // kv_heads)
    sent = torch.from_numpy(tiles).cuda()

    def ragged() -> None:
        for (q, _, _), (keys, values) in zip(inputs, caches, strict=True):
            ragged_attention(q, keys, values, tables, sent, head_dim**-0.5, None)

    def whole_prompt() -> None:
        for q, k, v in inputs:
            prompt_attention(q, k, v, head_dim**-0.5)

    kernels = {"ragged": ragged} | ({"whole prompt": whole_prompt} if len(lengths) == 1 and not context else {})
    return {name: median_us(chain, layers) for name, chain in kernels.items()}


def time_elementwise(rows: int, hidden: int = 4096, intermediate: int = 14336) -> list[tuple[str, float, float]]:
    """Name, microseconds and bytes of each kernel, at Llama-3.1-8B's widths."""
    layers, (heads, kv_heads, head_dim) = 8, SHAPES["Llama-3.1-8B"]
    width = (heads + 2 * kv_heads) * head_dim
    with torch.device("cuda"):
        x, gate_up, qkv = (
            [torch.randn(rows, columns).bfloat16() for _ in range(layers)]
            for columns in (hidden, 2 * intermediate, width)
        )
        weight = torch.randn(hidden).bfloat16()
        angles, slots = torch.randn(rows, head_dim // 2), torch.arange(rows, dtype=torch.int32)
        shape = (-(-rows // BLOCK_SIZE), BLOCK_SIZE, kv_heads, head_dim)
        keys, values = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(2))

    def rotate(each: torch.Tensor) -> object:
        return rotary.rotate_and_write(
            each, angles, angles, slots, slots, keys, values, num_heads=heads, num_kv_heads=kv_heads
        )

    kernels: list[tuple[str, list[torch.Tensor], Callable[[torch.Tensor], object], int]] = [
        ("rms_norm", x, lambda each: elementwise.rms_norm(each, weight, 1e-5), 4 * hidden),
        ("rms_norm_fp8", x, lambda each: elementwise.rms_norm_fp8(each, weight, 1e-5), 3 * hidden),
        ("quantize_fp8", x, elementwise.quantize_fp8, 3 * hidden),
        ("silu_mul", gate_up, elementwise.silu_mul, 6 * intermediate),
        ("silu_mul_fp8", gate_up, elementwise.silu_mul_fp8, 5 * intermediate),
        ("rotate_and_write", qkv, rotate, 4 * width + 4 * kv_heads * head_dim),
    ]
    return [
        (name, median_us(lambda run=run, inputs=inputs: [run(each) for each in inputs], layers), rows * row_bytes)
        for name, inputs, run, row_bytes in kernels
    ]


def main() -> None:
    torch.manual_seed(0)
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}: copies {rate / 1e12:.2f} TB/s")
    for model, shape in SHAPES.items():
        for rows, context in DECODES:
            us, num_bytes = time_decode(*shape, rows, context)
            share = num_bytes / rate * 1e6 / us
            print(f"{model:13} decode rows {rows:3} context {context:5} {us:8.2f} us {share:6.1%} of the copy rate")
        for lengths, context in PROMPTS:
            before = f" behind {context}" if context else ""
            flops = 2 * shape[0] * shape[2] * sum(tokens * (tokens + 2 * context) for tokens in lengths)
            times = time_prompts(*shape, lengths, context)
            found = ", ".join(f"{name} {us:.2f} us ({flops / us / 1e6:.0f} TFLOP/s)" for name, us in times.items())
            print(f"{model:13} prompts {len(lengths)} x {lengths[0]}{before}: {found}")
    for rows in (64, 256, 2048):
        for name, us, num_bytes in time_elementwise(rows):
            print(f"{name:16} rows {rows:4} {us:8.2f} us {num_bytes / us / 1e6:6.2f} TB/s")


if __name__ == "__main__":
    main()
