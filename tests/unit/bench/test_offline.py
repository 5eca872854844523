import gc
import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from hasten.bench.metrics import is_usable
from hasten.bench.offline import Progress, measure
from hasten.bench.result import BenchConfig, BenchRun
from hasten.bench.workload import sample_requests
from hasten.errors import RuntimeFailedError
from hasten.request import Request, TokenEvent
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.process import ProcessUsage, RuntimeProcess

PLAN = sample_requests(BenchConfig(8, 4, (1, 2), num_runs=3, num_warmup=1, num_threads=1, seed=0), 256)
Behaviour = Callable[[Request], list[TokenEvent]]


class Clerk:
    """Stands where a RuntimeProcess does, notes who was called with what, and does as it is told."""

    def __init__(self, name: str, calls: list[tuple[str, tuple[Request, ...]]], behaviour: Behaviour | None = None):
        self.name, self.calls, self.behaviour = name, calls, behaviour or well
        self.cpu_s = 0.0
        self.dies_at: int | None = None
        self.is_dead = False

    def usage(self) -> ProcessUsage:
        if self.is_dead:
            raise RuntimeFailedError(f"{self.name} is dead")
        return ProcessUsage(1, 1, self.cpu_s)

    def generate(self, requests: Iterable[Request]) -> list[TokenEvent]:
        self.calls.append((self.name, tuple(requests)))
        if self.dies_at is not None and sum(name == self.name for name, _ in self.calls) >= self.dies_at:
            raise RuntimeFailedError(f"{self.name} died")
        assert not gc.isenabled()
        self.cpu_s += 0.5
        return [event for request in requests for event in self.behaviour(request)]


def well(request: Request, num_tokens: int | None = None) -> list[TokenEvent]:
    num_tokens = num_tokens or request.sampling.max_tokens
    reasons = ["length" if index == num_tokens - 1 else None for index in range(num_tokens)]
    return [TokenEvent(request.request_id, 1, time.perf_counter(), finish_reason=reason) for reason in reasons]


def run_all(processes: dict[str, Any], **options: Any) -> list[tuple[str, BenchRun]]:
    return list(measure(processes, PLAN, **options))


def clerks(*names: str) -> tuple[dict[str, Any], list[tuple[str, tuple[Request, ...]]]]:
    calls: list[tuple[str, tuple[Request, ...]]] = []
    return {name: Clerk(name, calls) for name in names}, calls


def test_candidates_take_turns_on_the_same_requests_and_the_order_rotates() -> None:
    processes, calls = clerks("a", "b", "c")
    runs = run_all(processes)
    assert len(runs) == 3 * 3 * 2
    order = [[name for name, _ in calls[start : start + 3]] for start in range(0, len(calls), 3)]
    rounds = ["abc", "abc", "abc", "abc", "bca", "bca", "cab", "cab"]  # a warm-up, then three rounds, two levels each
    assert ["".join(names) for names in order] == rounds
    for start in range(0, len(calls), 3):
        assert len({requests for _, requests in calls[start : start + 3]}) == 1
    assert all(is_usable(run) and run.cpu_s == 0.5 for _, run in runs)
    assert {(name, run.concurrency, run.round_index) for name, run in runs} == set(
        itertools.product("abc", (1, 2), (0, 1, 2))
    )


def test_the_collector_is_on_again_afterwards() -> None:
    run_all(clerks("a")[0])
    assert gc.isenabled()


def test_what_is_done_is_not_done_again() -> None:
    first, _ = clerks("a", "b")
    runs = list(itertools.islice(measure(first, PLAN), 5))
    done: dict[str, list[BenchRun]] = {"a": [], "b": []}
    for name, run in runs:
        done[name].append(run)
    second, _ = clerks("a", "b")
    rest = run_all(second, done=done)
    made = [(name, run.concurrency, run.round_index) for name, run in runs + rest]
    assert len(made) == len(set(made)) == 12


def test_a_finished_candidate_is_not_even_warmed_up() -> None:
    processes, _ = clerks("a", "b")
    done = {"a": [run for name, run in run_all(processes) if name == "a"]}
    processes, calls = clerks("a", "b")
    run_all(processes, done=done)
    assert {name for name, _ in calls} == {"b"}


@pytest.mark.parametrize("dies_at", [1, 4])
def test_a_candidate_that_dies_is_recorded_once_and_the_others_go_on(dies_at: int) -> None:
    processes, calls = clerks("a", "b")
    processes["a"].dies_at = dies_at
    seen: list[Progress] = []
    runs = run_all(processes, on_progress=seen.append)
    failed = [run for name, run in runs if name == "a" and not is_usable(run)]
    assert [request.error for request in failed[0].requests] == ["a died"] * failed[0].concurrency
    assert len(failed) == 1
    assert sum(name == "a" for name, _ in calls) == dies_at
    assert sum(name == "b" for name, _ in runs) == 6
    assert (seen[-1].num_done, seen[-1].num_total, seen[-1].remaining_s) == (16, 16, 0)


def test_a_dead_idle_candidate_is_not_blamed_on_the_measured_one() -> None:
    processes, _ = clerks("a", "b")
    processes["b"].is_dead = True
    runs = run_all(processes)
    assert [is_usable(run) for name, run in runs if name == "a"] == [True] * 6
    assert [run.requests[0].error for name, run in runs if name == "b"] == ["b is dead"]


def cut_short(request: Request) -> list[TokenEvent]:
    return well(request, 3)


def refused(request: Request) -> list[TokenEvent]:
    return [TokenEvent(request.request_id, None, 1.0, finish_reason="error", error="the prompt is too long")]


def from_the_past(request: Request) -> list[TokenEvent]:
    return [TokenEvent(event.request_id, 1, 0.0, finish_reason=event.finish_reason) for event in well(request)]


def never_ending(request: Request) -> list[TokenEvent]:
    return well(request)[:-1]


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (cut_short, "3 tokens came, 4 were asked for"),
        (refused, "the prompt is too long"),
        (from_the_past, "the tokens' times do not run forward"),
        (never_ending, "the request did not end"),
    ],
)
def test_anything_but_the_tokens_asked_for_is_a_failed_run(behaviour: Behaviour, error: str) -> None:
    processes, _ = clerks("a")
    processes["a"].behaviour = behaviour
    runs = run_all(processes)
    assert len(runs) == 6
    for _, run in runs:
        assert not is_usable(run)
        assert {request.error for request in run.requests} == {error}


def test_progress_knows_the_time_left_once_everything_ran() -> None:
    processes, _ = clerks("a", "b")
    seen: list[Progress] = []
    run_all(processes, on_progress=seen.append)
    assert [each.num_done for each in seen] == list(range(1, 17))
    assert [each.remaining_s is None for each in seen] == [True] * 3 + [False] * 13
    assert seen[-1].remaining_s == 0


def test_a_time_budget_ends_between_rounds() -> None:
    processes, _ = clerks("a", "b")
    processes["a"].behaviour = lambda request: (time.sleep(0.02), well(request))[1]
    runs = run_all(processes, time_budget_s=0.01)
    assert {run.round_index for _, run in runs} == {0}
    assert len(runs) == 4
    assert len(run_all(clerks("a")[0], time_budget_s=60.0)) == 6


def test_idle_candidates_that_work_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    processes, _ = clerks("a", "b")

    def disturb(request: Request) -> list[TokenEvent]:
        processes["b"].cpu_s += 1
        return well(request)

    run_all(processes)
    assert not caplog.text
    processes["a"].behaviour = disturb
    run_all(processes)
    assert "while b" not in caplog.text
    assert "cores while a was measured" in caplog.text


def test_a_runtime_in_its_own_process_is_measured(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 256}')
    with RuntimeProcess("fake", RuntimeConfig(tmp_path, "fp32")) as process:
        runs = [run for _, run in measure({"fake-fp32": process}, PLAN)]
    assert len(runs) == 6
    assert all(is_usable(run) for run in runs)
