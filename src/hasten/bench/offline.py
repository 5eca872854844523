"""Measures runtimes in turns: one works, the others are idle.

In each round every candidate runs at each concurrency once, on the same requests, and the order
rotates, so that a machine that drifts drifts for all alike. A run is yielded as soon as it is
made, so the caller can keep it; what is already kept is not made again. A run that did not give
exactly the tokens that were asked for is recorded as failed, never silently dropped.

Computes no metric: that is `bench.metrics`. Loads no runtime.
"""

import gc
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby, pairwise

from hasten.bench.result import BenchRun, RequestRecord
from hasten.bench.workload import PlannedRun
from hasten.errors import HastenError
from hasten.request import Request, TokenEvent
from hasten.runtimes.process import RuntimeProcess

logger = logging.getLogger(__name__)

# idle candidates that use more of a core than this disturb the measured one
MAX_IDLE_CORES = 0.1

# thread pools spin after their last work, for 50 ms and more: a turn begins when the others have
# used no CPU time for this long, a little more than the steps in which it is counted
QUIET_S = 0.015
MAX_SETTLE_S = 0.3

Turn = tuple[str, PlannedRun]


@dataclass(frozen=True)
class Progress:
    """How far a measurement is, warm-ups included.

    Args:
        candidate: what ran last.
        remaining_s: from how long each candidate last took at each concurrency; None until
            each was seen once.
    """

    candidate: str
    num_done: int
    num_total: int
    remaining_s: float | None


def measure(
    processes: Mapping[str, RuntimeProcess],
    planned: Sequence[PlannedRun],
    *,
    done: Mapping[str, Sequence[BenchRun]] | None = None,
    time_budget_s: float | None = None,
    on_progress: Callable[[Progress], object] = lambda progress: None,
) -> Iterator[tuple[str, BenchRun]]:
    """Runs what `workload.sample_requests` planned and yields each measured run with its candidate.

    A candidate whose process fails, in a warm-up too, yields one failed run with the reason and
    is left out from then on.

    Args:
        processes: loaded runtimes by candidate name.
        done: runs that an earlier, interrupted measurement made; they are skipped. The
            warm-ups of candidates that still have something to do are not.
        time_budget_s: no round but the first begins if, as long as the longest so far, it
            would end later than this after the start.
    """
    turns = _turns(list(processes), planned, done or {})
    schedule = _Schedule(turns)
    running, disturbance = dict(processes), _Disturbance()
    began_s, longest_round_s = time.perf_counter(), 0.0
    for (is_warmup, index), round_turns in groupby(turns, key=lambda turn: (turn[1].is_warmup, turn[1].round_index)):
        round_began_s = time.perf_counter()
        if time_budget_s is not None and longest_round_s and round_began_s + longest_round_s > began_s + time_budget_s:
            logger.info("the time budget of %.0f s ends the measurement before round %d", time_budget_s, index + 1)
            break
        for name, plan in round_turns:
            if name not in running:
                continue
            turn_began_s = time.perf_counter()
            try:
                run = _measure_run(name, running, plan, disturbance)
            except HastenError as error:
                del running[name]
                schedule.drop(name)
                yield name, _failed_run(plan, turn_began_s, str(error))
            else:
                schedule.advance(name, plan, time.perf_counter() - turn_began_s)
                if not is_warmup:
                    yield name, run
            on_progress(schedule.progress(name))
        if not is_warmup:
            longest_round_s = max(longest_round_s, time.perf_counter() - round_began_s)
    disturbance.warn()


def _turns(names: Sequence[str], planned: Sequence[PlannedRun], done: Mapping[str, Sequence[BenchRun]]) -> list[Turn]:
    """Who runs what, in order: the first candidate of a round is the second of the round before."""
    made = {name: {(run.concurrency, run.round_index) for run in done.get(name, ())} for name in names}
    to_measure = [plan for plan in planned if not plan.is_warmup]
    has_work = {
        name for name in names if any((plan.concurrency, plan.round_index) not in made[name] for plan in to_measure)
    }
    turns = []
    for plan in planned:
        first = plan.round_index % max(1, len(names))
        for name in (*names[first:], *names[:first]):
            is_made = not plan.is_warmup and (plan.concurrency, plan.round_index) in made[name]
            if name in has_work and not is_made:
                turns.append((name, plan))
    return turns


class _Schedule:
    """What is left to do and how long it will take."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        self._left = Counter((name, plan.concurrency) for name, plan in turns)
        self._last_s: dict[tuple[str, int], float] = {}
        self._num_total = len(turns)

    def advance(self, name: str, plan: PlannedRun, took_s: float) -> None:
        self._left[name, plan.concurrency] -= 1
        self._last_s[name, plan.concurrency] = took_s

    def drop(self, name: str) -> None:
        """The candidate has failed: what it had left counts as done."""
        for key in self._left:
            if key[0] == name:
                self._left[key] = 0

    def progress(self, name: str) -> Progress:
        left = {key: count for key, count in self._left.items() if count}
        remaining_s = None
        if left.keys() <= self._last_s.keys():
            remaining_s = sum(count * self._last_s[key] for key, count in left.items())
        return Progress(name, self._num_total - sum(left.values()), self._num_total, remaining_s)


class _Disturbance:
    """CPU time of the candidates that should be idle, by the one that was measured."""

    def __init__(self) -> None:
        self._idle_s: defaultdict[str, float] = defaultdict(float)
        self._wall_s: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, idle_s: float, wall_s: float) -> None:
        self._idle_s[name] += idle_s
        self._wall_s[name] += wall_s

    def warn(self) -> None:
        for name, wall_s in self._wall_s.items():
            cores = self._idle_s[name] / wall_s
            if cores > MAX_IDLE_CORES:
                logger.warning("the idle candidates used %.2f cores while %s was measured", cores, name)


def _measure_run(
    name: str, running: Mapping[str, RuntimeProcess], plan: PlannedRun, disturbance: _Disturbance
) -> BenchRun:
    """Hands the requests over together and waits for the last to end."""
    process, others = running[name], [each for other, each in running.items() if other != name]
    _settle(others)
    idle_before_s, cpu_before_s = _cpu_s(others), process.usage().cpu_s
    with _collector_off():
        start_s = time.perf_counter()
        events = process.generate(plan.requests)
        end_s = time.perf_counter()
    cpu_s = max(0.0, process.usage().cpu_s - cpu_before_s)
    disturbance.add(name, _cpu_s(others) - idle_before_s, end_s - start_s)
    events_of: dict[str, list[TokenEvent]] = {request.request_id: [] for request in plan.requests}
    for event in events:
        events_of[event.request_id].append(event)
    records = tuple(_record(request, start_s, events_of[request.request_id]) for request in plan.requests)
    return BenchRun(plan.concurrency, plan.round_index, start_s, end_s, cpu_s, records)


def _settle(processes: Sequence[RuntimeProcess]) -> None:
    """Waits until the processes are idle, or for MAX_SETTLE_S."""
    deadline_s = time.perf_counter() + MAX_SETTLE_S
    used_s = _cpu_s(processes)
    while time.perf_counter() < deadline_s:
        time.sleep(QUIET_S)
        before_s, used_s = used_s, _cpu_s(processes)
        if used_s == before_s:
            return


def _cpu_s(processes: Sequence[RuntimeProcess]) -> float:
    """CPU time of all of them; one that has died is found out when it is its turn."""
    total_s = 0.0
    for process in processes:
        with suppress(HastenError):
            total_s += process.usage().cpu_s
    return total_s


@contextmanager
def _collector_off() -> Iterator[None]:
    """Python's garbage collector must not stop this process in a measured window."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _record(request: Request, submitted_s: float, events: Sequence[TokenEvent]) -> RequestRecord:
    times = tuple(event.time_s for event in events if event.token_id is not None)
    finish_reason = events[-1].finish_reason if events else None
    error = next((event.error for event in events if event.error is not None), None)
    if error is None and finish_reason is None:
        error = "the request did not end"
    elif error is None and len(times) != request.sampling.max_tokens:
        error = f"{len(times)} tokens came, {request.sampling.max_tokens} were asked for"
    elif error is None and any(after < before for before, after in pairwise((submitted_s, *times))):
        error = "the tokens' times do not run forward"
    return RequestRecord(
        request.request_id, len(request.prompt_token_ids), submitted_s, times, finish_reason or "error", error
    )


def _failed_run(plan: PlannedRun, start_s: float, reason: str) -> BenchRun:
    records = tuple(
        RequestRecord(request.request_id, len(request.prompt_token_ids), start_s, (), "error", reason)
        for request in plan.requests
    )
    return BenchRun(plan.concurrency, plan.round_index, start_s, time.perf_counter(), 0.0, records)
