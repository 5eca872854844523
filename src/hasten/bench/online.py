"""Measures a server: draws the load from its seed, sends it in rounds, and yields a run at a time.

A round has one run at each concurrency (closed loop), or one of the open loop. All requests of a run are
drawn before it begins; no two prompts of a measurement begin alike. When no request of a run is
answered, the measurement ends there.

Computes no metric: that is `bench.metrics`.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, repeat

from hasten.bench.arrivals import Arrivals, Lengths, TraceLine, arrival_times_s
from hasten.bench.endpoints import OnlineRequest
from hasten.bench.load import LoadGenerator
from hasten.bench.metrics import has_failed
from hasten.bench.prompts import PromptSource
from hasten.bench.result import BenchRun
from hasten.bench.server_usage import ServerMeter

MAX_IN_FLIGHT = 1024  # of an open loop: a server that falls behind must not exhaust the client's sockets


@dataclass(frozen=True)
class Plan:
    """The load of a measurement.

    Args:
        concurrency: clients of the closed loop; (MAX_IN_FLIGHT,) for an open one.
        rate_per_s, arrivals: of the open loop; rate_per_s None is a closed one.
        trace: requests with their times and lengths, instead of all of these.
        num_requests: for each client of a closed loop, else of a run.
        as_ids: whether prompts are sent as token ids.
    """

    prompt_lengths: Lengths
    output_lengths: Lengths
    concurrency: tuple[int, ...]
    num_requests: int
    num_runs: int
    num_warmup: int
    seed: int
    timeout_s: float
    rate_per_s: float | None = None
    arrivals: Arrivals = "poisson"
    trace: tuple[TraceLine, ...] = ()
    is_random: bool = False
    as_ids: bool = False


@dataclass(frozen=True)
class Moment:
    """How far a measurement is, warm-ups included.

    Args:
        num_ended, num_requests: of the run that is under way.
        remaining_s: from how long the runs so far took for each request; None in the first round.
    """

    concurrency: int
    num_runs_done: int
    num_runs: int
    num_ended: int
    num_requests: int
    remaining_s: float | None


OnMoment = Callable[[Moment], object]


def measure_server(
    generator: LoadGenerator,
    plan: Plan,
    source: PromptSource,
    meter: ServerMeter | None,
    on_moment: OnMoment = lambda moment: None,
) -> Iterator[BenchRun]:
    """Yields each measured run. Ends early after Ctrl-C, or when nothing is answered any more."""
    rounds = [(True, index) for index in range(plan.num_warmup)] + [(False, index) for index in range(plan.num_runs)]
    turns = [(is_warmup, index, level) for is_warmup, index in rounds for level in plan.concurrency]
    draws = Draws(plan, source)
    took_s: dict[int, float] = {}
    for done, (is_warmup, index, concurrency) in enumerate(turns):
        requests = draws.run(f"{'warmup' if is_warmup else 'round'}-{index}-concurrency-{concurrency}", concurrency)
        left = Counter(level for _, _, level in turns[done:])
        remaining_s = (
            sum(took_s[level] * count for level, count in left.items()) if left.keys() <= took_s.keys() else None
        )
        moment = Moment(concurrency, done, len(turns), 0, len(requests), remaining_s)
        on_moment(moment)
        began_s = time.perf_counter()
        run = generator.run(
            requests,
            concurrency,
            plan.timeout_s,
            meter=meter,
            on_count=lambda count, moment=moment: on_moment(replace(moment, num_ended=count)),  # type: ignore[misc]
        )
        took_s[concurrency] = time.perf_counter() - began_s
        is_dead = all(has_failed(record) for record in run.records)
        if run.records and (is_dead or not is_warmup):
            usage = None if meter is None else meter.usage
            yield BenchRun(
                concurrency=concurrency,
                round_index=index,
                start_s=run.start_s,
                end_s=run.end_s,
                cpu_s=None if usage is None else usage.cpu_s,
                requests=run.records,
                gpu=None if usage is None else usage.gpu,
                client_share=run.client_share,
            )
        if run.is_stopped or is_dead:
            return


class Draws:
    """The requests of each run, one after the other from one seed."""

    def __init__(self, plan: Plan, source: PromptSource) -> None:
        self._plan = plan
        self._random = random.Random(plan.seed)
        longest = max((line.prompt_tokens for line in plan.trace), default=plan.prompt_lengths.high)
        self._prompt = source.prompts(longest, plan.seed, is_random=plan.is_random, as_ids=plan.as_ids)

    def run(self, name: str, concurrency: int) -> tuple[OnlineRequest, ...]:
        return tuple(
            OnlineRequest(f"{name}-{index}", self._prompt(prompt_tokens), prompt_tokens, output_tokens, arrival_s)
            for index, (arrival_s, prompt_tokens, output_tokens) in enumerate(self._shapes(concurrency))
        )

    def _shapes(self, concurrency: int) -> Iterator[tuple[float | None, int, int]]:
        """Arrival time, prompt tokens and output tokens of each request."""
        plan = self._plan
        for line in plan.trace:
            yield line.arrival_s, line.prompt_tokens, line.output_tokens
        if plan.trace:
            return
        times: Iterator[float | None] = repeat(None)
        count = plan.num_requests * concurrency
        if plan.rate_per_s is not None:
            times, count = arrival_times_s(plan.arrivals, plan.rate_per_s, self._random), plan.num_requests
        for time_s in islice(times, count):
            yield time_s, plan.prompt_lengths.draw(self._random), plan.output_lengths.draw(self._random)
