"""The checks that every runtime must pass, whatever library is behind it."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from hasten.errors import MissingExtraError
from hasten.request import Request, SamplingParams, TokenEvent
from hasten.runtimes.base import Runtime, RuntimeConfig
from hasten.runtimes.continuation import eos_token_ids
from hasten.runtimes.registry import RUNTIMES, load_runtime, runtime_class

MAX_MODEL_TOKENS = 96
VOCAB_SIZE = 300  # below every tested model's
NUMBERS = np.random.default_rng(7)


def prompt(length: int) -> tuple[int, ...]:
    return tuple(NUMBERS.integers(3, VOCAB_SIZE, length).tolist())


def request(request_id: str, token_ids: Sequence[int], max_tokens: int = 8, **sampling: object) -> Request:
    values = {"max_tokens": max_tokens, "ignore_eos": True} | sampling
    return Request(request_id, tuple(token_ids), SamplingParams(**values))  # type: ignore[arg-type]


def run(runtime: Runtime, *requests: Request) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = defaultdict(list)
    for event in runtime.generate(requests):
        events[event.request_id].append(event)
    return events


def tokens(events: Sequence[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


@pytest.fixture(scope="module", params=sorted(RUNTIMES))
def prepared(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A runtime's name and the model as its `prepare` converts it."""
    name: str = request.param
    try:
        cls = runtime_class(name)
    except MissingExtraError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp(name) / "prepared"
    path = cls.prepare(model, "fp32", out)
    assert path == (out if out.exists() else model)
    return name, path


@pytest.fixture(scope="module")
def runtime(prepared: tuple[str, Path]) -> Iterator[Runtime]:
    name, path = prepared
    config = RuntimeConfig(path, "fp32", max_num_seqs=3, max_model_tokens=MAX_MODEL_TOKENS, num_threads=1)
    loaded = load_runtime(name, config)
    yield loaded
    loaded.close()


def test_loading_is_told_in_parts_that_rise_to_their_totals(prepared: tuple[str, Path]) -> None:
    name, path = prepared
    told: dict[str, list[tuple[int, int]]] = defaultdict(list)
    load_runtime(name, RuntimeConfig(path, "fp32"), lambda part, *step: told[part].append(step)).close()
    for steps in told.values():
        assert steps == sorted(set(steps))
        assert steps[-1][0] == steps[-1][1]
    assert "read" in told or name != "native"


@pytest.fixture(scope="module")
def eos(model: Path) -> frozenset[int]:
    return eos_token_ids(model)


def test_every_request_ends_once_with_its_number_of_tokens(runtime: Runtime) -> None:
    wanted = {"a": 1, "b": 5, "c": 9, "d": 3, "e": 7}
    events = run(runtime, *(request(name, prompt(6), count) for name, count in wanted.items()))
    assert {name: len(tokens(each)) for name, each in events.items()} == wanted
    for each in events.values():
        assert [event.finish_reason for event in each] == [None] * (len(each) - 1) + ["length"]


def test_times_never_go_back_and_tokens_are_known_one_after_the_other(runtime: Runtime) -> None:
    events = list(runtime.generate([request("a", prompt(5)), request("b", prompt(5))]))
    assert [event.time_s for event in events] == sorted(event.time_s for event in events)
    for name in "ab":
        times = [event.time_s for event in events if event.request_id == name]
        assert len(set(times)) == len(times)


def test_a_batch_of_different_lengths_gives_the_tokens_of_each_alone(runtime: Runtime) -> None:
    requests = [request(str(length), prompt(length), 12) for length in (7, 8, 20, 33)]
    requests.append(request("again", prompt(7), 12))
    requests.append(request("one", prompt(1), 12))
    together = run(runtime, *requests)
    for each in requests:
        assert tokens(together[each.request_id]) == tokens(run(runtime, each)[each.request_id])


def test_running_twice_gives_the_same_tokens(runtime: Runtime) -> None:
    again = request("r", prompt(9), 10)
    assert tokens(run(runtime, again)["r"]) == tokens(run(runtime, again)["r"])


def test_a_stop_token_ends_its_request_and_no_other(runtime: Runtime) -> None:
    first, second = request("first", prompt(6), 10), request("second", prompt(6), 10)
    free = {name: tokens(events) for name, events in run(runtime, first, second).items()}
    stop = free["first"][4]
    stopping = request("first", first.prompt_token_ids, 10, stop_token_ids=(stop,))
    events = run(runtime, stopping, second)
    assert tokens(events["first"]) == free["first"][: free["first"].index(stop) + 1]
    assert events["first"][-1].finish_reason == "stop"
    assert tokens(events["second"]) == free["second"]


def test_the_end_of_sequence_token_ends_a_request_unless_ignored(
    runtime: Runtime, eos: frozenset[int], ending_prompt: tuple[int, ...]
) -> None:
    free = tokens(run(runtime, request("r", ending_prompt, 20))["r"])
    at = next(index for index, token in enumerate(free) if token in eos)
    other = request("other", prompt(len(ending_prompt)), 20)
    ended = run(runtime, request("r", ending_prompt, 20, ignore_eos=False), other)
    assert tokens(ended["r"]) == free[: at + 1]
    assert ended["r"][-1].finish_reason == "stop"
    assert len(tokens(ended["other"])) == 20
    ignored = run(runtime, request("r", ending_prompt, 20), other)
    assert tokens(ignored["r"]) == free
    assert tokens(ignored["other"]) == tokens(ended["other"])


def test_a_prompt_may_hold_any_token(runtime: Runtime, eos: frozenset[int]) -> None:
    special = [request(str(last), (*prompt(4), last), 6) for last in sorted({0, 1, 2} | eos)]
    together = run(runtime, *special)
    for each in special:
        assert tokens(together[each.request_id]) == tokens(run(runtime, each)[each.request_id])


def test_a_request_that_cannot_run_errs_alone(runtime: Runtime) -> None:
    good = request("good", prompt(6), 5)
    alone = tokens(run(runtime, good)["good"])
    events = run(
        runtime,
        request("long", prompt(MAX_MODEL_TOKENS + 1)),
        good,
        request("foreign", (5, 10**7)),
    )
    for name in ("long", "foreign"):
        assert [(each.token_id, each.finish_reason) for each in events[name]] == [(None, "error")]
        assert events[name][0].error
    assert tokens(events["good"]) == alone


def test_no_requests_give_no_events(runtime: Runtime) -> None:
    assert list(runtime.generate([])) == []


def test_several_continuations_of_one_prompt(runtime: Runtime) -> None:
    events = run(runtime, request("r", prompt(5), 4, n=2))["r"]
    by_index = [[event for event in events if event.index == index] for index in (0, 1)]
    assert [len(each) for each in by_index] == [4, 4]
    assert [each[-1].finish_reason for each in by_index] == ["length", "length"]
    assert tokens(by_index[0]) == tokens(by_index[1])


def test_scores_are_normalized_and_name_the_greedy_tokens(runtime: Runtime) -> None:
    start = prompt(10)
    continued = tokens(run(runtime, request("r", start, 12))["r"])
    sequences = [(*start, *continued), prompt(22)]
    rows = list(runtime.score(sequences))
    assert len(rows) == 2
    for row in rows:
        assert row.dtype == np.float32
        assert row.shape[0] == 22
        assert np.allclose(np.logaddexp.reduce(row.astype(np.float64), axis=-1), 0.0, atol=1e-4)
    assert rows[0].argmax(axis=-1)[len(start) - 1 : -1].tolist() == continued


def test_sampling_is_done_or_refused(runtime: Runtime) -> None:
    drawn = request("r", prompt(6), 6, temperature=1.5, seed=3)
    events = run(runtime, drawn)["r"]
    if runtime.capabilities.samples:
        assert len(tokens(events)) == 6
        assert tokens(run(runtime, drawn)["r"]) == tokens(events)
    else:
        assert [event.finish_reason for event in events] == ["error"]
        assert "greedy" in (events[0].error or "")


def test_cancelling_ends_one_request_early(runtime: Runtime) -> None:
    if not runtime.capabilities.cancels:
        pytest.skip(f"{runtime.name} cannot cancel")
    events: dict[str, list[TokenEvent]] = defaultdict(list)
    for event in runtime.generate([request("r", prompt(6), 60), request("other", prompt(6), 20)]):
        events[event.request_id].append(event)
        if event.request_id == "r" and len(events["r"]) == 3:
            runtime.cancel("r")
    assert events["r"][-1].finish_reason == "cancelled"
    assert sum(event.finish_reason is not None for event in events["r"]) == 1
    assert len(tokens(events["r"])) < 20
    assert len(tokens(events["other"])) == 20
    assert len(tokens(run(runtime, request("r", prompt(6), 20))["r"])) == 20


def test_a_caller_that_stops_listening_leaves_a_usable_runtime(runtime: Runtime) -> None:
    stream = runtime.generate([request("r", prompt(6), 60)])
    next(stream)
    stream.close()
    assert len(tokens(run(runtime, request("next", prompt(6), 5))["next"])) == 5


def test_a_recording_is_a_trace_file_or_is_said_not_to_be(runtime: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    assert runtime.record([request("r", prompt(6), 4)], path) == path.is_file()
    assert len(tokens(run(runtime, request("r", prompt(6)))["r"])) == 8


def test_memory_on_a_gpu_is_told_only_there(runtime: Runtime) -> None:
    assert runtime.config.device in runtime.capabilities.devices
    assert runtime.peak_device_bytes(reset=True) is None


def test_a_trace_accounts_for_positive_times(runtime: Runtime) -> None:
    for sample in runtime.trace([request("r", prompt(6), 4)]):
        assert sample.time_s > 0
        assert math.isfinite(sample.time_s)
        assert sample.calls >= 1


def test_greedy_tokens_equal_those_of_transformers(runtime: Runtime, model: Path) -> None:
    if runtime.name in ("transformers", "fake"):
        pytest.skip(f"{runtime.name} is not compared")
    reference = load_runtime("transformers", RuntimeConfig(model, "fp32", num_threads=1))
    requests = [request(str(length), prompt(length), 16) for length in (3, 11, 24)]
    expected, got = run(reference, *requests), run(runtime, *requests)
    reference.close()
    assert {name: tokens(got[name]) for name in expected} == {name: tokens(expected[name]) for name in expected}
