"""How fast a GPU reads its memory, measured.

The buffer is larger than the caches and holds random numbers, because memory and caches of a
GPU may compress zeros. It is a limit, so the best of the repeats counts, as in STREAM (McCalpin
1995). Run as `python -m hasten.profiling.device_memory DEVICE` it prints bytes a second: a
process that only wants the figure then keeps no memory on the GPU.
"""

import sys

import torch

MAX_BUFFER_BYTES = 8 << 30
REPEATS = 12


def measure_device_read_bandwidth(device: str = "cuda") -> float:
    """The highest rate, in bytes a second, at which a sum over a buffer reads the GPU's memory."""
    num_bytes = min(MAX_BUFFER_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    buffer = torch.empty(num_bytes // 4, dtype=torch.float32, device=device).uniform_()
    times_s = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        buffer.sum()
        end.record()
        end.synchronize()
        times_s.append(start.elapsed_time(end) * 1e-3)
    return buffer.nbytes / min(times_s)


if __name__ == "__main__":
    sys.stdout.write(f"{measure_device_read_bandwidth(sys.argv[1])}\n")
