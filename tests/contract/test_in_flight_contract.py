"""The checks that every runtime must pass that takes requests while others run."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from hasten.errors import RequestError
from hasten.request import Request, SamplingParams, TokenEvent
from hasten.runtimes.base import EngineStats, InFlightRuntime, RuntimeConfig
from hasten.runtimes.continuation import eos_token_ids
from hasten.runtimes.registry import load_runtime

MAX_MODEL_TOKENS = 96


@pytest.fixture(scope="module", params=["fake", "native"])
def runtime(request: pytest.FixtureRequest, model: Path) -> Iterator[InFlightRuntime]:
    config = RuntimeConfig(model, "fp32", max_num_seqs=3, max_model_tokens=MAX_MODEL_TOKENS, num_threads=1)
    loaded = load_runtime(request.param, config)
    assert isinstance(loaded, InFlightRuntime)
    yield loaded
    loaded.close()


def request(request_id: str, max_tokens: int = 8, n: int = 1, first_token: int = 7) -> Request:
    return Request(request_id, (first_token, 11, 13, 17), SamplingParams(max_tokens=max_tokens, n=n, ignore_eos=True))


def run(runtime: InFlightRuntime, max_steps: int = 1000) -> dict[tuple[str, int], list[TokenEvent]]:
    events: dict[tuple[str, int], list[TokenEvent]] = defaultdict(list)
    for _ in range(max_steps):
        if not runtime.has_unfinished:
            break
        for event in runtime.step():
            events[event.request_id, event.index].append(event)
    return events


def tokens(events: list[TokenEvent]) -> list[int | None]:
    return [event.token_id for event in events]


def counters(stats: EngineStats) -> tuple[int, int]:
    return stats.num_prompt_tokens, stats.num_generated_tokens


def test_facts_are_those_of_the_model_and_the_config(runtime: InFlightRuntime, model: Path) -> None:
    facts = runtime.facts
    assert (facts.model, facts.runtime, facts.scheme, facts.device) == (model.name, runtime.name, "fp32", "cpu")
    assert (facts.max_num_seqs, facts.max_model_tokens) == (3, MAX_MODEL_TOKENS)
    assert facts.vocab_size > 300
    assert facts.eos_token_ids == tuple(sorted(eos_token_ids(model)))
    assert facts.num_kv_blocks == runtime.stats().num_kv_blocks


def test_a_request_that_joins_others_gets_the_tokens_that_it_has_alone(runtime: InFlightRuntime) -> None:
    requests = [request(str(number), 6 + number, first_token=20 + number) for number in range(5)]
    alone = {}
    for each in requests:
        runtime.submit(each)
        alone |= run(runtime)
    together: dict[tuple[str, int], list[TokenEvent]] = defaultdict(list)
    for each in requests:
        runtime.submit(each)
        for key, events in run(runtime, max_steps=3).items():
            together[key] += events
    for key, events in run(runtime).items():
        together[key] += events
    for key, events in alone.items():
        assert tokens(together[key]) == tokens(events)
        assert [event.finish_reason for event in together[key]] == [None] * (len(events) - 1) + ["length"]


def test_a_request_that_cannot_run_is_refused_and_leaves_nothing(runtime: InFlightRuntime) -> None:
    before = runtime.stats()
    with pytest.raises(RequestError, match="prompt has 200 tokens"):
        runtime.submit(Request("long", (5,) * 200))
    with pytest.raises(RequestError, match=r"vocabulary|is not between"):
        runtime.submit(Request("foreign", (10**6,)))
    assert not runtime.has_unfinished
    assert runtime.stats() == before


def test_an_id_is_refused_while_its_request_runs(runtime: InFlightRuntime) -> None:
    runtime.submit(request("r", 4))
    with pytest.raises(RequestError, match="a request with this id is running"):
        runtime.submit(request("r", 4))
    assert [len(events) for events in run(runtime).values()] == [4]
    runtime.submit(request("r", 2))
    assert [len(events) for events in run(runtime).values()] == [2]


def test_cancelling_gives_back_at_once_what_was_held(runtime: InFlightRuntime) -> None:
    runtime.submit(request("kept", 12))
    runtime.step()
    runtime.step()
    held = runtime.stats()
    runtime.submit(request("cancelled", 50, n=2, first_token=30))
    runtime.submit(request("waiting", 50, first_token=40))
    run(runtime, max_steps=3)
    assert (runtime.stats().num_running, runtime.stats().num_waiting) == (3, 1)
    for request_id in ("cancelled", "waiting", "cancelled", "unknown"):
        runtime.cancel(request_id)
    assert (runtime.stats().num_running, runtime.stats().num_waiting) == (1, 0)
    assert runtime.stats().num_used_kv_blocks == held.num_used_kv_blocks
    rest = run(runtime)
    assert tokens(rest["waiting", 0]) == tokens(rest["cancelled", 0]) == tokens(rest["cancelled", 1]) == [None]
    assert rest["cancelled", 1][0].finish_reason == "cancelled"
    assert rest["kept", 0][-1].finish_reason == "length"
    assert runtime.stats().num_used_kv_blocks == 0


def test_stats_count(runtime: InFlightRuntime) -> None:
    before = runtime.stats()
    runtime.submit(request("r", 5, n=2))
    runtime.submit(request("s", 3))
    run(runtime)
    after = runtime.stats()
    assert counters(after) == (counters(before)[0] + 8, counters(before)[1] + 13)
    assert 5 <= after.num_steps - before.num_steps <= 7
