from pathlib import Path

import pytest
from gpu_traces import TraceWriter, graph_trace

from hasten.profiling.gpu_activity import GpuActivity, gpu_activity
from hasten.profiling.timeline import read_timeline


def activity_of(trace: TraceWriter, folder: Path) -> GpuActivity | None:
    return gpu_activity(read_timeline(trace.write(folder / "trace.json.gz")))


def test_a_step_of_a_graph_is_counted_without_the_prefill(tmp_path: Path) -> None:
    activity = activity_of(graph_trace(num_steps=3), tmp_path)
    assert activity is not None
    assert activity.num_steps == 3
    assert (activity.launches, activity.waits, activity.kernels, activity.copies) == (2, 1, 12, 1)
    assert activity.busy_s == pytest.approx(125e-6)
    assert activity.gaps == pytest.approx((3 * 11 + 2) / 3)
    assert activity.median_gap_s == pytest.approx(1e-6)
    assert activity.traced_step_s == pytest.approx((3 * 125 + 35) / 3 * 1e-6)
    assert activity.traced_busy_share == pytest.approx(125 / (125 + 35 / 3))
    assert activity.busy_share(250e-6) == pytest.approx(0.5)
    assert activity.busy_share(100e-6) == 1
    times = {group.group: (group.time_s * 1e6, group.calls) for group in activity.groups}
    expected = {"gate_up": 40, "down": 24, "qkv": 20, "head": 15, "o": 12, "attention": 10, "sampling": 2, "copies": 2}
    assert {group: time for group, (time, _) in times.items()} == pytest.approx(expected)
    assert list(times)[:3] == ["gate_up", "down", "qkv"]
    assert times["gate_up"][1] == 2


def test_kernels_that_overlap_are_busy_once(tmp_path: Path) -> None:
    trace = TraceWriter()
    trace.range("decode", 0, 10)
    trace.call("cudaLaunchKernel", 1, ("kernel", "a", 10, 20))
    trace.call("cudaLaunchKernel", 3, ("kernel", "b", 15, 40))
    trace.call("cudaLaunchKernel", 5, ("kernel", "c", 16, 18))
    activity = activity_of(trace, tmp_path)
    assert activity is not None
    assert activity.busy_s == pytest.approx(30e-6)
    assert (activity.gaps, activity.median_gap_s) == (0, None)
    assert activity.groups[0].time_s == pytest.approx(37e-6)


def test_a_trace_without_decode_or_without_a_gpu_tells_nothing(tmp_path: Path) -> None:
    on_cpu = TraceWriter()
    on_cpu.range("decode", 0, 10)
    assert activity_of(on_cpu, tmp_path) is None
    prefill_only = TraceWriter()
    prefill_only.range("prefill", 0, 10)
    prefill_only.call("cudaLaunchKernel", 1, ("kernel", "a", 10, 20))
    assert activity_of(prefill_only, tmp_path) is None
