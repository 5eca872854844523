"""The scheduler under random use: nothing leaks, nobody starves, every token is the right one."""

from collections.abc import Callable
from contextlib import suppress

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hasten.engine.engine import Engine
from hasten.engine.model_runner import Collect
from hasten.engine.scheduler import Schedule
from hasten.engine.sequence import Sequence
from hasten.request import Request, SamplingParams, TokenEvent

Run = Callable[..., dict[tuple[str, int], list[TokenEvent]]]


def request(name: str, num_prompt_tokens: int, max_tokens: int, priority: int = 0, **sampling: object) -> Request:
    prompt = tuple(int(name[1:]) % 7 if i % 5 == 4 else i % 3 for i in range(num_prompt_tokens))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, **sampling), priority)


def order(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.arrival


def num_tokens_in(events: list[TokenEvent]) -> int:
    return sum(event.token_id is not None for event in events)


@pytest.fixture
def machine(make_engine: Callable[..., Engine], expected_tokens: Callable[[list[int], int], list[int]]) -> type:
    class SchedulerMachine(RuleBasedStateMachine):
        """A cache of 12 blocks for up to 4 sequences of up to 40 tokens: preemption is common."""

        @initialize(budget=st.integers(4, 12), prefix_cache=st.booleans(), overlaps=st.booleans())
        def start(self, budget: int, prefix_cache: bool, overlaps: bool) -> None:
            self.engine = make_engine(
                overlaps=overlaps,
                num_blocks=12,
                max_num_seqs=4,
                max_num_batched_tokens=budget,
                max_model_tokens=40,
                enable_prefix_cache=prefix_cache,
                consecutive_blocks=not overlaps,
            )
            self.requests: dict[str, Request] = {}
            self.events: dict[tuple[str, int], list[TokenEvent]] = {}

        @rule(
            num_prompt_tokens=st.integers(1, 39),
            max_tokens=st.integers(1, 30),
            n=st.integers(1, 3),
            priority=st.integers(-1, 1),
        )
        def add(self, num_prompt_tokens: int, max_tokens: int, n: int, priority: int) -> None:
            added = request(f"r{len(self.requests)}", num_prompt_tokens, max_tokens, priority, n=n)
            self.requests[added.request_id] = added
            self.engine.add_request(added)

        @rule()
        def step(self) -> None:
            first = min(self.engine.scheduler.running, key=order, default=None)
            for event in self.engine.step():
                self.events.setdefault((event.request_id, event.index), []).append(event)
            assert first is None or first.slot is not None or first.is_finished, "the first in order was preempted"

        @rule()
        def step_that_fails(self) -> None:
            def fail(schedule: Schedule) -> Collect:
                raise ValueError("no launch")

            with pytest.MonkeyPatch.context() as patch, suppress(ValueError):
                patch.setattr(self.engine._runner, "launch", fail)
                self.step()

        @rule(number=st.integers(0, 20))
        def abort(self, number: int) -> None:
            self.engine.abort(f"r{number}")

        @invariant()
        def is_whole(self) -> None:
            if hasattr(self, "engine"):
                self.engine.scheduler.check_integrity()

        def teardown(self) -> None:
            if not hasattr(self, "engine"):
                return
            # In every step the first running sequence computes at least one token. What waits before it may
            # join and preempt it, once for each sequence. Where steps overlap one more brings the last token.
            num_sequences = sum(each.sampling.n for each in self.requests.values())
            num_tokens = sum(
                each.sampling.n * (len(each.prompt_token_ids) + each.sampling.max_tokens)
                for each in self.requests.values()
            )
            for _ in range(2 + num_sequences * num_tokens):
                if self.engine.has_unfinished:
                    self.step()
                    self.is_whole()
            assert not self.engine.has_unfinished, "a request starved"
            assert self.engine.block_manager.num_free_blocks == 12
            for each in self.requests.values():
                for index in range(each.sampling.n):
                    self.check(each, self.events[each.request_id, index])

        def check(self, each: Request, events: list[TokenEvent]) -> None:
            reasons = [event.finish_reason for event in events if event.finish_reason is not None]
            assert reasons == [events[-1].finish_reason], "every continuation ends exactly once"
            tokens = [event.token_id for event in events if event.token_id is not None]
            assert tokens == expected_tokens(list(each.prompt_token_ids), len(tokens))
            if reasons == ["length"]:
                assert len(tokens) == min(each.sampling.max_tokens, 40 - len(each.prompt_token_ids))
            else:
                assert reasons in (["cancelled"], ["error"])

    return SchedulerMachine


def test_random_walk(machine: type[RuleBasedStateMachine]) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(machine, settings=settings(max_examples=20, stateful_step_count=40, deadline=None))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=8),
    num_blocks=st.integers(4, 30),
)
def test_sequence_beyond_the_cache_ends_in_an_error_and_the_others_go_on(
    make_engine: Callable[..., Engine], lengths: list[tuple[int, int]], num_blocks: int
) -> None:
    engine = make_engine(num_blocks=num_blocks, max_num_seqs=3, max_num_batched_tokens=16)
    room = num_blocks * 4
    accepted = [request(f"r{i}", prompt, output) for i, (prompt, output) in enumerate(lengths) if prompt <= room]
    for each in accepted:
        engine.add_request(each)
    events: dict[str, list[TokenEvent]] = {each.request_id: [] for each in accepted}
    while engine.has_unfinished:
        for event in engine.step():
            events[event.request_id].append(event)
        engine.scheduler.check_integrity()
    for each in accepted:
        last = events[each.request_id][-1]
        # the last token drawn needs no place in the cache
        if len(each.prompt_token_ids) + each.sampling.max_tokens <= room + 1:
            assert last.finish_reason == "length"
        else:
            assert last.finish_reason == "error"
            assert f"room for {room}" in (last.error or "")
            assert num_tokens_in(events[each.request_id]) == room + 1 - len(each.prompt_token_ids)
    assert engine.block_manager.num_free_blocks == num_blocks


def test_long_prompt_is_chunked_while_others_decode(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=8)
    engine.add_request(request("r1", 3, 30))
    engine.step()
    engine.add_request(request("r2", 40, 5))
    tokens_of_each_step = []
    while engine.has_unfinished and "r2" not in str(tokens_of_each_step[-1:]):
        tokens_of_each_step.append([event.request_id for event in engine.step()])
    assert tokens_of_each_step == [["r1"]] * 5 + [["r1", "r2"]]  # 40 tokens, 7 in each step beside r1's


def test_overlapping_steps_give_a_token_each(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(overlaps=True)
    engine.add_request(request("r1", 5, 10))
    tokens_of_each_step = []
    while engine.has_unfinished:
        tokens_of_each_step.append(len(engine.step()))
    assert tokens_of_each_step == [0, 1, 0] + [1] * 9  # behind the prompt there is room for arrivals
    assert engine._runner._model.num_steps == 10  # type: ignore[attr-defined]


def test_budget_is_never_exceeded(make_engine: Callable[..., Engine], run: Run) -> None:
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=8, num_blocks=20)
    run(engine, [request(f"r{i}", 17 + i, 20) for i in range(6)])
    assert engine._runner._model.most_tokens == 8  # type: ignore[attr-defined]


def test_latest_arrival_is_preempted_and_the_first_is_not_disturbed(
    make_engine: Callable[..., Engine], expected_tokens: Callable[[list[int], int], list[int]]
) -> None:
    engine = make_engine(num_blocks=8, enable_prefix_cache=False)
    requests = [request("r1", 12, 18), request("r2", 12, 18)]
    for each in requests:
        engine.add_request(each)
    steps: dict[str, list[int]] = {"r1": [], "r2": []}
    tokens: dict[str, list[int | None]] = {"r1": [], "r2": []}
    for step in range(100):
        for event in engine.step():
            steps[event.request_id].append(step)
            tokens[event.request_id].append(event.token_id)
    assert engine.scheduler.num_preemptions == 1
    assert steps["r1"] == list(range(18)), "one token in every step"
    for each in requests:
        assert tokens[each.request_id] == expected_tokens(list(each.prompt_token_ids), 18)


def test_requests_start_in_the_order_of_arrival(make_engine: Callable[..., Engine], run: Run) -> None:
    engine = make_engine(num_blocks=16, max_num_seqs=2)
    # r1 is large and does not fit beside r0; r2 is small and would.
    events = run(engine, [request("r0", 30, 10), request("r1", 60, 2), request("r2", 2, 2)])
    first = [events[f"r{i}", 0][0].time_s for i in range(3)]
    assert first == sorted(first)
    assert first[1] > events["r0", 0][-1].time_s


def test_requests_start_by_priority_and_those_of_one_priority_by_arrival(
    make_engine: Callable[..., Engine], run: Run
) -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add_request(request("r9", 5, 8, priority=3))
    engine.step()  # it runs, and what is more important waits for its end
    priorities = {"r0": 1, "r1": 0, "r2": 1, "r3": -1, "r4": 0}
    events = run(engine, [request(name, 5, 3, priority) for name, priority in priorities.items()])
    first_s = {name: events[name, 0][0].time_s for name in priorities}
    assert sorted(first_s, key=first_s.__getitem__) == ["r3", "r1", "r4", "r0", "r2"]
    assert events["r9", 0][-1].time_s < first_s["r3"]
    assert engine.scheduler.num_preemptions == 0


def test_the_least_important_is_preempted_even_if_it_came_first(make_engine: Callable[..., Engine], run: Run) -> None:
    engine = make_engine(num_blocks=12, enable_prefix_cache=False)
    requests = [request("r0", 12, 18, priority=1), request("r1", 12, 18), request("r2", 12, 18)]
    for each in requests:
        engine.add_request(each)
    steps: dict[str, list[int]] = {each.request_id: [] for each in requests}
    for step in range(200):
        for event in engine.step():
            steps[event.request_id].append(step)
        engine.scheduler.check_integrity()
    assert engine.scheduler.num_preemptions > 0
    assert steps["r1"] == list(range(18)), "one token in every step"
    assert steps["r2"][-1] < steps["r0"][-1]
    assert all(len(each) == 18 for each in steps.values())


def test_counters(make_engine: Callable[..., Engine], run: Run) -> None:
    engine = make_engine()
    run(engine, [request("r0", 7, 3, n=2), request("r1", 5, 4)])
    scheduler = engine.scheduler
    assert (scheduler.num_prompt_tokens, scheduler.num_generated_tokens) == (12, 10)
    assert scheduler.num_steps == engine._runner._model.num_steps  # type: ignore[attr-defined]


def test_admission_leaves_room_for_those_that_run_to_grow(make_engine: Callable[..., Engine], run: Run) -> None:
    engine = make_engine(num_blocks=8, enable_prefix_cache=False)
    # r1 would fill the last block just when r0 needs one
    run(engine, [request("r0", 16, 5), request("r1", 16, 5)])
    assert engine.scheduler.num_preemptions == 0


def test_continuations_share_the_blocks_of_the_prompt(make_engine: Callable[..., Engine]) -> None:
    for enable_prefix_cache in (True, False):
        engine = make_engine(enable_prefix_cache=enable_prefix_cache)
        engine.add_request(request("r0", 21, 8, n=4))
        engine.step()
        engine.step()
        tables = [sequence.table.block_ids for sequence in engine.scheduler.running]
        assert len(tables) == 4
        assert all(table[:5] == tables[0][:5] for table in tables)
        assert len({table[5] for table in tables}) == 4
        model = engine._runner._model
        assert model.num_computed_tokens == (21 + 3) + 4  # type: ignore[attr-defined]


def test_prefix_cache_computes_only_what_is_new(make_engine: Callable[..., Engine], run: Run) -> None:
    for enable_prefix_cache, num_computed in ((True, 41 + 1 + 2), (False, 2 * 42)):
        engine = make_engine(enable_prefix_cache=enable_prefix_cache)
        run(engine, [request("r0", 41, 2)])
        [(first, second)] = run(engine, [request("r7", 41, 2)]).values()  # the same prompt
        assert (first.num_cached_tokens, second.num_cached_tokens) == (40 if enable_prefix_cache else 0, None)
        assert engine._runner._model.num_computed_tokens == num_computed  # type: ignore[attr-defined]
        assert engine.scheduler.num_prefix_hit_tokens == (40 if enable_prefix_cache else 0)


def test_prompts_that_arrive_together_share_what_they_begin_with(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_num_batched_tokens=64)
    begin = tuple(range(3, 15))
    for name in ("r0", "r1", "r2"):
        prompt = (*begin, 20 + int(name[1])) if name != "r1" else tuple(range(30, 43))
        engine.add_request(Request(name, prompt, SamplingParams(max_tokens=2)))
    schedule = engine.scheduler.schedule()
    assert [(chunk.start, chunk.num_tokens) for chunk in schedule.chunks] == [(0, 13), (0, 13), (12, 1)]


def test_blocks_are_hashed_when_their_step_is_launched(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_num_batched_tokens=64)
    engine.add_request(request("r0", 40, 2))
    [chunk] = engine.scheduler.schedule().chunks
    assert len(chunk.sequence.known_blocks) == 1, "the one that was looked for"
    engine.scheduler.record_blocks()
    assert len(chunk.sequence.known_blocks) == 10
    engine.add_request(Request("r1", (*chunk.sequence.token_ids[:40], 5), SamplingParams(max_tokens=2)))
    assert engine.scheduler.schedule().chunks[-1].start == 40


def test_prefix_cache_off_does_not_find_blocks_of_another_request_with_continuations(
    make_engine: Callable[..., Engine], run: Run
) -> None:
    engine = make_engine(enable_prefix_cache=False)
    run(engine, [request("r0", 21, 2, n=2)])
    hits = engine.scheduler.num_prefix_hit_tokens
    run(engine, [request("r7", 21, 2)])
    assert engine.scheduler.num_prefix_hit_tokens == hits


def test_random_state_survives_preemption(make_engine: Callable[..., Engine], run: Run) -> None:
    requests = [request(f"r{i}", 12, 18, temperature=1.0, seed=i) for i in range(3)]
    alone = {}
    for each in requests:
        alone |= run(make_engine(), [each])
    engine = make_engine(num_blocks=8)
    together = run(engine, requests)
    assert engine.scheduler.num_preemptions > 0
    for key, events in alone.items():
        assert [event.token_id for event in together[key]] == [event.token_id for event in events]
    assert torch.tensor([events[0].token_id for events in alone.values()]).unique().numel() > 1
