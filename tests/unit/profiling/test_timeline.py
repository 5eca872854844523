from pathlib import Path

import pytest
from gpu_traces import TraceWriter, graph_trace

from hasten.errors import RuntimeFailedError
from hasten.profiling.timeline import read_timeline


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_work_knows_its_launch_and_the_ranges_around_it(tmp_path: Path, name: str) -> None:
    trace = TraceWriter()
    trace.range("decode", 10, 100)
    trace.range("module self_attn", 20, 60)
    trace.range("module q_proj", 25, 30)
    trace.range("something else", 24, 40)
    trace.call("cudaLaunchKernel", 26, ("kernel", "gemm", 200, 210))
    trace.call("cuLaunchKernelEx", 40, ("kernel", "rotate", 210, 220), category="cuda_driver")
    trace.call("cudaMemcpyAsync", 120, ("gpu_memcpy", "Memcpy HtoD", 230, 231))
    timeline = read_timeline(trace.write(tmp_path / name))
    gemm, rotate, copy = timeline.work
    assert gemm.ranges == ("decode", "module self_attn", "module q_proj")
    assert rotate.ranges == ("decode", "module self_attn")
    assert (copy.ranges, copy.is_copy, gemm.is_copy) == ((), True, False)
    assert gemm.launched_s == pytest.approx(26e-6)
    assert (rotate.start_s, rotate.end_s) == pytest.approx((210e-6, 220e-6))
    assert [call.name for call in timeline.calls] == ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaMemcpyAsync"]
    assert [phase.name for phase in timeline.phases] == ["decode"]


def test_all_kernels_of_a_graph_have_its_launch(tmp_path: Path) -> None:
    timeline = read_timeline(graph_trace(num_steps=2).write(tmp_path / "t.json"))
    graphs = [work.correlation for work in timeline.work if "stream_linear" in work.name]
    assert len(graphs) == 18
    assert len(set(graphs)) == 2


def test_work_whose_launch_was_lost_is_kept(tmp_path: Path) -> None:
    trace = graph_trace(num_steps=1)
    trace.events = [event for event in trace.events if event.get("cat") != "cuda_runtime"]
    timeline = read_timeline(trace.write(tmp_path / "t.json"))
    assert len(timeline.work) == 14
    assert {work.launched_s for work in timeline.work} == {None}


@pytest.mark.parametrize("text", ["", "{}", '{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k"}]}', "[1]"])
def test_a_file_that_is_no_trace_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(RuntimeFailedError, match=r"t\.json cannot be read"):
        read_timeline(path)
    with pytest.raises(RuntimeFailedError, match=r"absent\.json\.gz cannot be read"):
        read_timeline(tmp_path / "absent.json.gz")
