"""Runs the GPU kernels and a tiny engine under compute-sanitizer: python benchmarks/gpu/sanitize.py.

memcheck looks for accesses outside of what was allocated, racecheck for races in shared memory.
For the kernels torch takes every tensor from the driver, so that an access past one is seen; the
engine runs as it is, with CUDA graphs. Prints a verdict for each tool and part. Ends with 0 if all are
clean, with 1 if a tool found something or a part did not run to its end, with 2 without compute-sanitizer.

NVIDIA's release notes tell of hazards that were none in racecheck: of copies that an mbarrier counts before
2026.3, of barriers across a cluster before 2026.1. So the version is printed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

TOOLS = ("memcheck", "racecheck")
QUIET = {"memcheck": ("--report-api-errors", "no"), "racecheck": ("--kernel-name-exclude", "kns=cudnn")}
"""cuda-bindings asks the driver for functions that it does not have, which memcheck would count as errors; in cuDNN's
own attention racecheck reports the hand-over by mbarriers that it does not follow."""
PARTS = ("products", "clusters", "attention", "elementwise", "sampling", "engine")


def products() -> None:
    import torch

    from hasten.kernels.cuda.int8_matmul import int8_matmul
    from hasten.kernels.cuda.stream_linear import stream_linear, supports

    many_tiles = 16 * 3 * torch.cuda.get_device_properties(0).multi_processor_count  # each CTA has several
    shapes = ((1, 128, 640, False), (7, 96, 1024, True), (16, 515, 896, False), (2, many_tiles, 640, False))
    for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        for rows, n, k, is_gated in shapes:
            x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            weight = torch.randn(n, k, device="cuda").mul(9 if dtype == torch.int8 else 1).to(dtype)
            scale = None if dtype == torch.bfloat16 else torch.rand(n, device="cuda")
            norm = torch.rand(k, device="cuda", dtype=torch.bfloat16)
            stream_linear(x, weight, scale=scale, norm_weight=norm, eps=1e-5, gated=is_gated)
            if not is_gated:  # leaves its squares to a norm
                hidden = torch.zeros(rows, n, device="cuda", dtype=torch.bfloat16)
                hidden = stream_linear(x, weight, scale=scale, residual=hidden)
                behind, weights = torch.ones(64, n, device="cuda", dtype=torch.bfloat16), torch.ones_like(hidden[0])
                if supports(behind, rows):
                    stream_linear(hidden, behind, norm_weight=weights, eps=1e-5)
            if dtype == torch.int8:
                int8_matmul(torch.randn(33, k, device="cuda", dtype=torch.bfloat16), weight, scale)


def clusters() -> None:
    """Products whose K is split over a cluster, as bf16 of 16 rows has it."""
    import torch

    from hasten.kernels.cuda.stream_linear import StreamConfig, stream_linear

    x = torch.randn(9, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(100, 4096, device="cuda", dtype=torch.bfloat16)
    norm = torch.rand(4096, device="cuda", dtype=torch.bfloat16)
    square = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for cluster in (2, 4):
        config = StreamConfig(cluster=cluster)
        hidden = stream_linear(x, square, residual=torch.zeros_like(x), config=config)
        stream_linear(hidden, weight, norm_weight=norm, eps=1e-5, config=config)


def attention() -> None:
    import numpy as np
    import torch

    from hasten.kernels.cuda.decode_attention import DecodeWorkspace, decode_attention
    from hasten.kernels.cuda.ragged_attention import attention_tiles, ragged_attention

    for dtype, dim, heads, kv_heads in (
        (torch.bfloat16, 128, 8, 2),
        (torch.bfloat16, 80, 4, 4),
        (torch.float16, 96, 3, 1),
        (torch.float32, 64, 4, 2),
        (torch.bfloat16, 64, 16, 1),
    ):
        keys, values = (torch.randn(40, 16, kv_heads, dim, device="cuda", dtype=dtype) for _ in range(2))
        cos, sin = (torch.rand(256, dim // 2, device="cuda") for _ in range(2))
        tables = torch.randperm(40, device="cuda", dtype=torch.int32)[:36].view(3, 12).contiguous()
        slots = torch.tensor([2, 0, 1, -1], device="cuda", dtype=torch.int32)
        positions = torch.tensor([0, 33, 191, -1], device="cuda", dtype=torch.int32)
        workspace = DecodeWorkspace(4, heads, dim, "cuda")
        qkv = torch.randn(4, (heads + 2 * kv_heads) * dim, device="cuda", dtype=dtype)
        options = {"num_heads": heads, "num_kv_heads": kv_heads, "scale": dim**-0.5, "workspace": workspace}
        for window in (None, 20):
            decode_attention(qkv, cos, sin, keys, values, tables, slots, positions, window=window, **options)
            columns = (np.array(column) for column in ((0, 1, 20), (1, 19, 30), (1, 0, 2), (99, 41, 0)))
            tiles = torch.from_numpy(attention_tiles(*columns, heads // kv_heads)).cuda()
            q = torch.randn(50, heads, dim, device="cuda", dtype=dtype)
            ragged_attention(q, keys, values, tables, tiles, dim**-0.5, window)


def elementwise() -> None:
    import torch

    from hasten.kernels.cuda.elementwise import quantize_fp8, rms_norm, rms_norm_fp8, silu_mul
    from hasten.kernels.cuda.rotary import rotate_and_write

    for rows, size in ((1, 72), (33, 515), (9, 4096)):
        x = torch.randn(rows, 2 * size, device="cuda", dtype=torch.bfloat16)
        weight = torch.rand(2 * size, device="cuda", dtype=torch.bfloat16)
        rms_norm(x, weight, 1e-5, addend=torch.ones_like(x))
        rms_norm_fp8(x, weight, 1e-5)
        quantize_fp8(x)
        silu_mul(x)
    for dim in (64, 80, 96, 128):
        qkv = torch.randn(5, 8 * dim, device="cuda", dtype=torch.bfloat16)
        cos, sin = (torch.rand(64, dim // 2, device="cuda") for _ in range(2))
        keys, values = (torch.zeros(4, 16, 2, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        positions = torch.tensor([0, 63, 5, 6, 7], device="cuda", dtype=torch.int32)
        slots = torch.tensor([63, 0, -1, 20, 21], device="cuda", dtype=torch.int32)
        rotate_and_write(qkv, cos, sin, positions, slots, keys, values, num_heads=4, num_kv_heads=2)


def sampling() -> None:
    import torch

    from hasten.kernels.cuda.sample import GreedyWorkspace, SamplingState, greedy_rows, sample_rows
    from hasten.request import SamplingParams

    for vocab_size in (301, 32001):
        state = SamplingState(4, vocab_size, "cuda")
        asked = (
            SamplingParams(temperature=1.0, top_k=40, top_p=0.9),
            SamplingParams(repetition_penalty=1.2, frequency_penalty=0.5),
            SamplingParams(temperature=0.7, min_p=0.05),
            SamplingParams(),
        )
        state.set_slots(range(4), asked, [[1, 2, 3]] * 4, [[4, 4]] * 4)
        logits = torch.randn(5, vocab_size, device="cuda").mul(4)
        slots = torch.tensor([3, 1, 0, 2, -1], device="cuda", dtype=torch.int32)
        out = torch.empty(5, device="cuda", dtype=torch.int32)
        greedy_rows(logits, out, GreedyWorkspace(8, "cuda"))
        state = SamplingState(8, vocab_size, "cuda")
        sample_rows(logits, slots, torch.rand(5, device="cuda", dtype=torch.float64), state, out)


def engine() -> None:
    from hasten.request import Request, SamplingParams
    from hasten.runtimes.base import RuntimeConfig
    from hasten.runtimes.native import NativeRuntime

    model = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
    for scheme in ("bf16", "w8a16"):
        runtime = NativeRuntime(RuntimeConfig(model, scheme, max_num_seqs=3, max_model_tokens=256, device="cuda"))
        requests = [
            Request("greedy", tuple(range(5, 90)), SamplingParams(max_tokens=4, ignore_eos=True)),
            Request(
                "drawn", tuple(range(9, 20)), SamplingParams(max_tokens=4, ignore_eos=True, temperature=1.0, seed=1)
            ),
        ]
        tokens = [event.token_id for event in runtime.generate(requests)]
        assert len(tokens) == 8, tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--part", choices=PARTS, help="run one part in this process, without a tool")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="of one part under one tool")
    arguments = parser.parse_args()
    if arguments.part is not None:
        globals()[arguments.part]()
        import torch

        torch.cuda.synchronize()
        return 0
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on the PATH: it comes with the CUDA toolkit")
        return 2
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True, check=True).stdout
    print(version.strip().splitlines()[-1])
    tools, parts = arguments.tools.split(","), arguments.parts.split(",")
    if "engine" in parts:  # kernels are tuned when it is first loaded, which takes minutes under a tool
        subprocess.run(_command("engine"), check=True)
    jobs = [(tool, part) for tool in tools for part in parts]
    num_clean = sum(_is_clean(tool, part, arguments.timeout_s) for tool, part in jobs)
    print(f"{num_clean} of {len(jobs)} clean")
    return int(num_clean < len(jobs))


def _command(part: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--part", part]


def _is_clean(tool: str, part: str, timeout_s: float) -> bool:
    """Runs one part under one tool and prints its verdict, and what the tool said if that is not clean."""
    environment = dict(os.environ)
    if part != "engine":  # a graph cannot be captured without torch's own allocator
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    start_s = time.perf_counter()
    try:
        run = subprocess.run(
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *QUIET.get(tool, ()), *_command(part)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout_s,
            check=False,
        )
        said, status = run.stdout + run.stderr, run.returncode
        verdict = _verdict(said, status)
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace") + (error.stderr or b"").decode(errors="replace")
        verdict = f"NOT DONE in {timeout_s:.0f} s"
    print(f"{tool:10} {part:12} {time.perf_counter() - start_s:6.1f} s  {verdict}", flush=True)
    if verdict != "clean":
        print("\n".join(said.splitlines()[:60]))
    return verdict == "clean"


def _verdict(said: str, status: int) -> str:
    """A summary counts "12 hazards displayed (12 errors, 0 warnings)" or "0 errors"; there is one a process."""
    counts = [int(count) for count in re.findall(r"SUMMARY: (\d+) (?:hazard|error)", said)]
    if sum(counts):
        return f"FOUND {sum(counts)}"
    if status or not counts:
        return f"DID NOT RUN, exit status {status}"
    return "clean"


if __name__ == "__main__":
    sys.exit(main())
