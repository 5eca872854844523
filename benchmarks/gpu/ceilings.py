"""What the GPU can do at most: bytes a second and operations a second, measured on random data.

Run as a program it prints one line of JSON.
"""

import json
import statistics
from collections.abc import Callable

import torch

COPY_ELEMENTS = 1 << 31  # bf16: 4.3 GB read and as many written
MATRIX_SIZE = 8192
REPEATS = 10


def median_s(operation: Callable[[], object]) -> float:
    """Seconds on the GPU, the median of REPEATS after three that do not count."""
    for _ in range(3):
        operation()
    times_ms = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        operation()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return statistics.median(times_ms) * 1e-3


def measure() -> dict[str, float]:
    source = torch.randn(COPY_ELEMENTS // 4, device="cuda").bfloat16().repeat(4)
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source))
    read_s = median_s(lambda: torch.sum(source.view(torch.int64)))
    a, b = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device="cuda").bfloat16() for _ in range(2))
    operations = 2 * MATRIX_SIZE**3
    ceilings = {
        "copy_bytes_per_s": 2 * source.nbytes / copy_s,
        "read_bytes_per_s": source.nbytes / read_s,
        "bf16_flop_per_s": operations / median_s(lambda: a @ b),
    }
    if torch.cuda.get_device_capability() >= (8, 9):
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
        one = torch.ones((), device="cuda")
        scaled = lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)  # noqa: E731
        ceilings["fp8_flop_per_s"] = operations / median_s(scaled)
    return ceilings


if __name__ == "__main__":
    print(json.dumps(measure()))
