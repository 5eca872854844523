import re
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from gpu_traces import TraceWriter, graph_trace

from hasten.errors import MissingExtraError, RuntimeFailedError
from hasten.profiling import power
from hasten.profiling.gpu_decode import GpuDecode, describe_gpu_bottleneck, measure_power_w, profile_gpu_decode
from hasten.request import Request, TokenEvent

STEP_S = 200e-6


class Machine:
    """Gives a token every step_s and records a trace that was made by hand."""

    weight_bytes_per_token = 400_000

    def __init__(self, trace: TraceWriter | None, step_s: float = STEP_S) -> None:
        self.trace, self.step_s = trace, step_s

    def generate(
        self, requests: Sequence[Request], on_event: Callable[[TokenEvent], object] | None = None
    ) -> list[TokenEvent]:
        [request] = requests
        events = [TokenEvent("r", 1, 1.0 + self.step_s * index) for index in range(request.sampling.max_tokens)]
        for event in events:
            if on_event is not None:
                on_event(event)
        return events

    def record(self, requests: Sequence[Request], path: Path) -> bool:
        if self.trace is not None:
            self.trace.write(path)
        return self.trace is not None


def profiled(machine: Any, folder: Path) -> GpuDecode | None:
    return profile_gpu_decode(machine, [1, 2, 3], folder / "t.json.gz", 8)


def test_the_parts_add_up_to_the_step_without_a_profiler(tmp_path: Path) -> None:
    decode = profiled(Machine(graph_trace()), tmp_path)
    assert decode is not None
    assert decode.step_s == pytest.approx(STEP_S)
    result = decode.result(400_000, 8e9)
    assert sum(part.time_s for part in result.operators) == pytest.approx(STEP_S)
    assert result.operators[0].group == "GPU idle"
    assert result.operators[0].time_s == pytest.approx(STEP_S - 125e-6)
    assert result.bottleneck == (
        "the CPU: the GPU works 62% of a step (0.125 ms of 0.2 ms) and waits for 2 launches the rest; "
        "linear layers read 0 MB of weights at 4 GB/s, 45% of memory's 8, "
        "which allows at most 20000 tokens/s on this GPU"
    )


def test_a_busy_gpu_is_its_own_bottleneck(tmp_path: Path) -> None:
    decode = profiled(Machine(graph_trace(), step_s=127e-6), tmp_path)
    assert decode is not None
    sentence = describe_gpu_bottleneck(decode, None, None)
    assert sentence == "the GPU, busy 98% of a step: gate_up takes 32% of that (0.04 ms of 0.125 ms)"
    assert describe_gpu_bottleneck(decode, 400_000, 1e9).endswith("more than memory's 1: from the GPU's caches")


def test_a_runtime_that_shows_nothing_has_no_profile(tmp_path: Path) -> None:
    assert profiled(Machine(None), tmp_path) is None
    assert profiled(Machine(TraceWriter()), tmp_path) is None


class Nvml(types.SimpleNamespace):
    """A driver whose GPU draws 300 W on a clock that moves by a step of the machine at each reading."""

    class NVMLError(Exception):
        pass

    def __init__(self, tells: bool = True) -> None:
        super().__init__(nvmlInit=lambda: None, nvmlShutdown=lambda: None, asked=[])
        self.tells, self.now_s = tells, 0.0

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        self.asked.append(index)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: object) -> int:
        if not self.tells:
            raise self.NVMLError("Not Supported")
        self.now_s += 1.0
        return round(self.now_s * 300_000)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nvml]:
    driver = Nvml()
    monkeypatch.setattr(power, "require", lambda module: driver)
    monkeypatch.setattr(power.time, "perf_counter", lambda: driver.now_s)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield driver


@pytest.mark.parametrize(("visible", "asked"), [(None, 0), ("2,3", 2), ("GPU-abc", "GPU-abc")])
def test_power_is_energy_over_the_time_between_first_and_last_token(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, asked: object
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine: Any = Machine(None)
    assert measure_power_w(machine, [1], STEP_S, 50) == pytest.approx(300)
    assert nvml.asked == [asked]


def test_a_window_that_is_too_short_has_no_power(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power.time, "perf_counter", lambda: nvml.now_s / 1000)
    machine: Any = Machine(None)
    assert measure_power_w(machine, [1], STEP_S, 50) is None


def test_a_driver_or_library_that_does_not_tell_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    machine: Any = Machine(None)
    monkeypatch.setattr(power, "require", lambda module: Nvml(tells=False))
    with pytest.raises(RuntimeFailedError, match="does not tell the GPU's power: Not Supported"):
        measure_power_w(machine, [1], STEP_S, 50)
    monkeypatch.undo()
    monkeypatch.setattr("hasten.extras.is_installed", lambda module: False)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'hasten[cuda]'")):
        measure_power_w(machine, [1], STEP_S, 50)
