"""Chrome traces as torch's profiler writes them for a GPU, made by hand."""

import gzip
import json
from pathlib import Path
from typing import Any


class TraceWriter:
    """Times are microseconds. One thread on the CPU, one stream on the GPU."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "args": {"name": "python"}}]
        self._correlation = 0

    def range(self, name: str, start: float, end: float) -> None:
        self._add("user_annotation", name, start, end, 1, {})

    def call(
        self, name: str, start: float, *work: tuple[str, str, float, float], category: str = "cuda_runtime"
    ) -> None:
        """A call of one microsecond that starts work: (category, name, start, end) of each piece."""
        self._correlation += 1
        self._add(category, name, start, start + 1, 1, {"correlation": self._correlation})
        for kind, work_name, begin, end in work:
            self._add(kind, work_name, begin, end, 7, {"correlation": self._correlation, "stream": 7})

    def write(self, path: Path) -> Path:
        text = json.dumps({"schemaVersion": 1, "traceEvents": self.events}).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
        return path

    def _add(self, category: str, name: str, start: float, end: float, tid: int, args: dict[str, Any]) -> None:
        event = {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": tid, "ts": start, "dur": end - start}
        self.events.append(event | {"args": args})


GRAPH_STEP = (
    ("stream_linear_norm_bf16", 10),
    ("_decode_attention_kernel", 5),
    ("stream_linear_residual_bf16", 6),
    ("stream_linear_gated_bf16", 20),
    ("stream_linear_residual_bf16", 12),
) * 2 + (("stream_linear_norm_bf16", 15), ("_greedy_kernel", 2))


def graph_trace(num_steps: int = 3, gap: float = 1.0) -> TraceWriter:
    """The engine: a prefill, then one graph of two layers a step, a copy of the token, and a wait for it.

    A step is 123 µs of kernels with 11 gaps, a copy of 2 µs right after them, and a gap before the next.
    """
    trace = TraceWriter()
    trace.range("prefill", 0, 50)
    trace.call("cudaLaunchKernel", 10, ("kernel", "nvjet_tst_128x64_64x4_1x2_h_bz_TNN", 20, 300))
    now = 400.0
    for step in range(num_steps):
        begin = 100.0 + 10 * step
        trace.range("decode", begin, begin + 5)
        work = []
        for name, length in GRAPH_STEP:
            work.append(("kernel", name, now, now + length))
            now += length + gap
        now -= gap
        trace.call("cudaGraphLaunch", begin + 1, *work)
        trace.call("cudaMemcpyAsync", begin + 3, ("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", now, now + 2))
        trace.call("cudaEventSynchronize", begin + 6)
        now += 2 + gap
    return trace
