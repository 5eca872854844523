"""What a runtime that computes with torch tells about itself: operators, a trace file, GPU memory.

Shared by the adapters that use torch; the others must not import this, because it imports torch.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from hasten.runtimes.base import OperatorSample


def sample_operators(run: Callable[[], object]) -> tuple[OperatorSample, ...]:
    """Self time on the CPU of each operator that `run` calls in this thread."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return tuple(
        OperatorSample(row.key, row.self_cpu_time_total * 1e-6, row.count)
        for row in profiler.key_averages()
        if row.self_cpu_time_total > 0
    )


def record_trace(run: Callable[[], object], path: Path, device: str) -> None:
    """Runs under torch's profiler (CUPTI on a GPU) and writes a Chrome trace, compressed if path ends in .gz."""
    activities = [ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        run()
        if device != "cpu":
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(path))


def peak_device_bytes(device: str, reset: bool) -> int | None:
    """Most bytes of tensors on the GPU since the last reset, None on a CPU."""
    if device == "cpu":
        return None
    peak_bytes = torch.cuda.max_memory_allocated(device)
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return peak_bytes
