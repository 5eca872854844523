from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.bench.result import OperatorTime
from hasten.errors import RuntimeFailedError
from hasten.profiling.decode import describe_bottleneck, profile_decode, scale_to_step
from hasten.request import Request, TokenEvent
from hasten.runtimes.base import OperatorSample, RuntimeConfig
from hasten.runtimes.process import RuntimeProcess


class Machine:
    """Prefill takes a second, a step ten milliseconds, of which linear layers take eight."""

    weight_bytes_per_token: int | None = 80_000_000

    def __init__(self, traces: bool = True, loses: int = 0, slowdown: float = 1.0, step_s: float = 0.01) -> None:
        self.traces, self.loses, self.slowdown, self.step_s = traces, loses, slowdown, step_s

    def generate(self, requests: Sequence[Request], on_event: object = None) -> list[TokenEvent]:
        [request] = requests
        count = request.sampling.max_tokens - self.loses
        return [TokenEvent(request.request_id, 1, 1.0 + self.step_s * index) for index in range(count)]

    def trace(self, requests: Sequence[Request]) -> tuple[OperatorSample, ...]:
        if not self.traces:
            return ()
        steps = requests[0].sampling.max_tokens - 1
        return (
            OperatorSample("aten::mm", (0.9 + 0.008 * steps) * self.slowdown, 10 + 10 * steps),
            OperatorSample("aten::copy_", (0.1 + 0.0015 * steps) * self.slowdown, 2 + 2 * steps),
        )


def profile(machine: Any, bandwidth: float | None = 20e9) -> Any:
    return profile_decode(machine, [1, 2, 3], bandwidth)


def test_a_step_is_divided_among_groups() -> None:
    result = profile(Machine())
    assert result.step_s == pytest.approx(0.01)
    assert [each.group for each in result.operators] == ["linear", "copies and casts", "outside operators"]
    assert [each.time_s for each in result.operators] == pytest.approx([0.008, 0.0015, 0.0005])
    assert [each.calls for each in result.operators] == pytest.approx([10, 2, 0])
    assert result.bottleneck == (
        "linear takes 80% of a step (8 ms of 10 ms); linear layers read 80 MB of weights at 10.0 GB/s, "
        "50% of memory's 20.0, which allows at most 250 tokens/s on this machine"
    )


def test_operators_that_the_profiler_slowed_are_scaled_to_the_step() -> None:
    result = profile(Machine(slowdown=2))
    assert sum(each.time_s for each in result.operators) == pytest.approx(0.01)
    assert result.operators[0].time_s == pytest.approx(0.01 * 8 / 9.5)
    assert result.operators[-1].time_s == 0


def test_a_trace_that_something_else_delayed_does_not_count() -> None:
    class Disturbed(Machine):
        num_traces = 0

        def trace(self, requests: Sequence[Request]) -> tuple[OperatorSample, ...]:
            self.num_traces += 1
            delay_s = 5.0 if self.num_traces in (2, 5) else 0.0  # one of the short traces and one of the long
            return (*super().trace(requests), OperatorSample("aten::mm", delay_s, 0))

    assert [each.time_s for each in profile(Disturbed()).operators] == pytest.approx([0.008, 0.0015, 0.0005])


def test_operators_too_short_to_be_seen_are_outside() -> None:
    class Quick(Machine):
        def trace(self, requests: Sequence[Request]) -> tuple[OperatorSample, ...]:
            return (OperatorSample("aten::mm", 1 / requests[0].sampling.max_tokens, 1),)  # the longer, the less

    result = profile(Quick())
    assert [(each.group, each.time_s) for each in result.operators] == [("outside operators", pytest.approx(0.01))]


def test_a_runtime_without_a_profiler_has_no_profile() -> None:
    assert profile(Machine(traces=False)) is None


def test_too_few_tokens_are_an_error() -> None:
    with pytest.raises(RuntimeFailedError, match="17 tokens, 18 were asked for"):
        profile(Machine(loses=1))
    with pytest.raises(RuntimeFailedError, match="all tokens at once"):
        profile(Machine(step_s=0))


def test_the_sentence_says_only_what_is_known() -> None:
    operators = [OperatorTime("linear", 0.8, 1), OperatorTime("outside operators", 0.2, 0)]
    assert describe_bottleneck(operators, 1.0, None, 1e9) == "linear takes 80% of a step (800 ms of 1 s)"
    assert describe_bottleneck(operators, 1.0, 8_000_000, None).endswith("read 8 MB of weights at 0.0 GB/s")
    in_cache = describe_bottleneck(operators, 1.0, 8_000_000, 1e6)
    assert in_cache.endswith("more than memory's 0.0: from the processor's caches")
    assert describe_bottleneck(operators[::-1], 0.3, None, None).startswith("work outside operators")


@given(st.lists(st.floats(1e-9, 1), min_size=1, max_size=5), st.floats(1e-9, 1))
def test_the_parts_add_up_to_the_step(times: list[float], step_s: float) -> None:
    scaled = scale_to_step([OperatorTime(str(index), each, 1) for index, each in enumerate(times)], step_s)
    assert sum(each.time_s for each in scaled) == pytest.approx(step_s)
    assert all(each.time_s >= 0 for each in scaled)
    assert [each.time_s for each in scaled] == sorted((each.time_s for each in scaled), reverse=True)


def test_a_runtime_in_its_own_process_is_profiled(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 256}')
    with RuntimeProcess("fake", RuntimeConfig(tmp_path, "fp32")) as process:
        result = profile_decode(process, [1, 2, 3], None)
    assert result is not None
    assert {each.group for each in result.operators} == {"other", "outside operators"}
