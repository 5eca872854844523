"""The engine's promises to its caller: every request ends, and says why."""

import random
from collections.abc import Callable

import pytest
import torch

from hasten.engine.engine import Engine
from hasten.engine.model_runner import Collect
from hasten.engine.sampler import SampledToken
from hasten.engine.scheduler import Schedule
from hasten.errors import RequestError
from hasten.request import Request, SamplingParams, TokenEvent

Run = Callable[..., dict[tuple[str, int], list[TokenEvent]]]
Expected = Callable[[list[int], int], list[int]]


def request(request_id: str = "r", prompt: tuple[int, ...] = (1, 2, 3), **sampling: object) -> Request:
    return Request(request_id, prompt, SamplingParams(**sampling))


def tokens_in(events: list[TokenEvent]) -> list[int | None]:
    return [event.token_id for event in events]


def test_greedy_tokens_and_their_end(make_engine: Callable[..., Engine], run: Run, expected_tokens: Expected) -> None:
    events = run(make_engine(), [request(max_tokens=20)])["r", 0]
    assert tokens_in(events) == expected_tokens([1, 2, 3], 20)
    assert [event.finish_reason for event in events] == [None] * 19 + ["length"]
    times = [event.time_s for event in events]
    assert times == sorted(times)


def test_eos_token_ends_a_continuation_and_is_reported(
    make_engine: Callable[..., Engine], run: Run, expected_tokens: Expected
) -> None:
    tokens = expected_tokens([1, 2, 3], 20)
    length = tokens.index(tokens[7]) + 1
    engine = make_engine(eos_token_ids=[tokens[7]])
    events = run(engine, [request(max_tokens=20)])["r", 0]
    assert tokens_in(events) == tokens[:length]
    assert events[-1].finish_reason == "stop"
    assert tokens_in(run(engine, [request(max_tokens=20, ignore_eos=True)])["r", 0]) == tokens


@pytest.mark.parametrize("overlaps", [False, True])
def test_min_tokens_come_before_an_end(
    make_engine: Callable[..., Engine], run: Run, expected_tokens: Expected, *, overlaps: bool
) -> None:
    end = expected_tokens([1, 2, 3], 20)[3]
    engine = make_engine(eos_token_ids=[end], overlaps=overlaps)
    free, bound = (run(engine, [request(max_tokens=40, min_tokens=count)])["r", 0] for count in (0, 12))
    assert len(free) <= 4
    assert end not in tokens_in(bound)[:12]
    assert len(bound) > 12


def test_stop_token_ids_hold_even_without_eos(
    make_engine: Callable[..., Engine], run: Run, expected_tokens: Expected
) -> None:
    tokens = expected_tokens([1, 2, 3], 20)
    sampling = {"max_tokens": 20, "ignore_eos": True, "stop_token_ids": (tokens[5],)}
    events = run(make_engine(), [request(**sampling)])["r", 0]
    assert tokens_in(events) == tokens[: tokens.index(tokens[5]) + 1]
    assert events[-1].finish_reason == "stop"


def test_output_ends_at_the_context(make_engine: Callable[..., Engine], run: Run) -> None:
    events = run(make_engine(max_model_tokens=10), [request(max_tokens=100)])["r", 0]
    assert len(events) == 7
    assert events[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "limits", "message"),
    [
        ((1,) * 128, {}, "prompt has 128 tokens .* at most 128: shorten the prompt to 127 or less"),
        ((1,) * 20, {"num_blocks": 4}, "prompt has 20 tokens and the KV cache room for 16"),
        ((1, 50), {}, "token id 50 is not between 0 and 49"),
        ((1, -1), {}, "token id -1 is not between 0 and 49"),
    ],
)
def test_request_that_can_never_run_is_refused(
    make_engine: Callable[..., Engine], prompt: tuple[int, ...], limits: dict, message: str
) -> None:
    engine = make_engine(**limits)
    with pytest.raises(RequestError, match=message):
        engine.add_request(request(prompt=prompt))
    assert not engine.has_unfinished


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"logit_bias": ((3, 1.0), (50, 1.0))}, "logit_bias: token id 50 is not between 0 and 49"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids: token id -1 is not between 0 and 49"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(
    make_engine: Callable[..., Engine], sampling: dict, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        make_engine().add_request(request(**sampling))


def test_request_id_may_be_used_again_once_it_has_ended(make_engine: Callable[..., Engine], run: Run) -> None:
    engine = make_engine()
    engine.add_request(request(n=2))
    with pytest.raises(RequestError, match="a request with this id is running"):
        engine.add_request(request())
    engine.abort("r")
    engine.add_request(request(max_tokens=1))
    assert [event.finish_reason for event in run(engine)["r", 0]] == ["cancelled", "length"]


def test_abort_frees_blocks_at_once(make_engine: Callable[..., Engine], run: Run, expected_tokens: Expected) -> None:
    engine = make_engine(max_num_seqs=3)
    engine.add_request(request("kept", max_tokens=10))
    engine.add_request(request("aborted", n=4, max_tokens=10))
    events = [event for _ in range(3) for event in engine.step()]
    num_free = engine.block_manager.num_free_blocks
    engine.abort("aborted")
    assert engine.block_manager.num_free_blocks > num_free
    engine.scheduler.check_integrity()
    engine.abort("aborted")
    engine.abort("unknown")
    rest = run(engine)
    assert [rest["aborted", index][-1].finish_reason for index in range(4)] == ["cancelled"] * 4
    assert all(len(rest["aborted", index]) == 1 for index in range(4))
    kept = [event for event in events if event.request_id == "kept"] + rest["kept", 0]
    assert tokens_in(kept) == expected_tokens([1, 2, 3], 10)


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_prompts_logprobs_come_before_its_tokens_and_hold_nobody_up(
    make_engine: Callable[..., Engine],
    run: Run,
    expected_tokens: Expected,
    context_logits: Callable[[list[int]], torch.Tensor],
    *,
    overlaps: bool,
) -> None:
    prompt = tuple(index % 50 for index in range(300))
    engine = make_engine(overlaps=overlaps, max_model_tokens=400, num_blocks=200)
    engine.add_request(request("scored", prompt, max_tokens=3, prompt_logprobs=2, n=2))
    engine.add_request(request("other", max_tokens=2))
    events: list[TokenEvent] = []
    while not any(event.token_id is not None for event in events if event.request_id == "scored"):
        events += engine.step()
    order = [(event.request_id, event.prompt_logprobs is not None) for event in events]
    assert order.index(("other", False)) < len(order) - 1 - order[::-1].index(("scored", True)), "between two chunks"
    scored = [[each for each in events if each.prompt_logprobs and each.index == index] for index in range(2)]
    parts, again = ([event.prompt_logprobs for event in each] for each in scored)
    assert parts == again
    assert [len(part or ()) for part in parts] == [128, 128, 43]
    logprobs = [one for part in parts for one in part or ()]
    for place in (1, 127, 128, 129, 256, 299):
        expected = context_logits(list(prompt[:place])).log_softmax(-1)
        value, top = logprobs[place - 1]
        assert value == pytest.approx(expected[prompt[place]].item(), abs=1e-5)
        assert [token_id for token_id, _ in top] == expected.topk(2).indices.tolist()
    for key, rest in run(engine).items():
        events += rest if key[0] == "scored" else []
    for index in range(2):
        own = [event.token_id for event in events if (event.request_id, event.index) == ("scored", index)]
        assert own == [None] * 3 + expected_tokens(list(prompt), 3)
    assert engine.block_manager.num_free_blocks == 200


@pytest.mark.parametrize(("num_tokens", "parts"), [(1, [0]), (2, [1]), (128, [127]), (129, [128]), (130, [128, 1])])
def test_each_token_of_a_prompt_but_the_first_is_scored_once(
    make_engine: Callable[..., Engine], num_tokens: int, parts: list[int]
) -> None:
    engine = make_engine(max_model_tokens=400, num_blocks=200)
    engine.add_request(request(prompt=(1,) * num_tokens, max_tokens=1, prompt_logprobs=1))
    events: list[TokenEvent] = []
    while engine.has_unfinished:
        events += engine.step()
    assert [len(event.prompt_logprobs) for event in events if event.prompt_logprobs is not None] == parts
    assert events[-1].finish_reason == "length"
    assert engine.block_manager.num_free_blocks == 200


def test_a_prompt_that_is_being_scored_can_be_aborted(make_engine: Callable[..., Engine], run: Run) -> None:
    engine = make_engine(max_model_tokens=400, num_blocks=200)
    engine.add_request(request("scored", (1,) * 300, prompt_logprobs=0))
    assert [len(event.prompt_logprobs or ()) for event in engine.step()] == [128]
    assert engine.block_manager.num_free_blocks < 200
    engine.abort("scored")
    assert engine.block_manager.num_free_blocks == 200
    assert [event.finish_reason for event in run(engine)["scored", 0]] == ["cancelled"]
    assert not engine.has_unfinished


def test_scoring_that_fails_ends_its_request_alone(
    make_engine: Callable[..., Engine], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_model_tokens=400, num_blocks=200)
    engine.add_request(request("scored", (1,) * 300, prompt_logprobs=0))
    engine.add_request(request("other", max_tokens=5))
    engine.step()

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "logsumexp", fail)  # behind the model, with the prompt's blocks held
        [end] = [event for event in engine.step() if event.request_id == "scored"]
    assert end.finish_reason == "error"
    assert end.error is not None and "RuntimeError: no such kernel" in end.error
    assert [event.finish_reason for event in run(engine)["other", 0]][-1] == "length"


def test_a_prompt_waits_for_the_blocks_that_its_scoring_needs(make_engine: Callable[..., Engine], run: Run) -> None:
    engine = make_engine(max_model_tokens=100, num_blocks=25, enable_prefix_cache=False)
    engine.add_request(request("running", (1,) * 60, max_tokens=20))
    for _ in range(3):
        engine.step()
    engine.add_request(request("scored", (2,) * 70, max_tokens=1, prompt_logprobs=0))
    events = run(engine)
    assert [events[name, 0][-1].finish_reason for name in ("running", "scored")] == ["length", "length"]
    assert events["scored", 0][0].prompt_logprobs is not None
    assert events["scored", 0][0].time_s > events["running", 0][-1].time_s


def test_continuations_of_a_greedy_request_agree(make_engine: Callable[..., Engine], run: Run) -> None:
    events = run(make_engine(), [request(prompt=tuple(range(13)), n=3, max_tokens=9)])
    assert [tokens_in(events["r", index]) for index in range(3)] == [tokens_in(events["r", 0])] * 3


def test_prompts_that_arrive_while_others_are_computed_join_the_next_step(
    make_engine: Callable[..., Engine], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(overlaps=True, max_num_batched_tokens=8, enable_prefix_cache=False)
    launched: list[list[str]] = []
    launch = engine._runner.launch

    def record(schedule: Schedule) -> Collect:
        launched.append([chunk.sequence.request.request_id for chunk in schedule.chunks])
        return launch(schedule)

    monkeypatch.setattr(engine._runner, "launch", record)
    engine.add_request(request("a"))
    assert engine.step() == []  # a's prompt is under way
    engine.add_request(request("b"))
    assert [event.request_id for event in engine.step()] == ["a"]
    assert launched == [["a"]]  # c may still come
    engine.add_request(request("c"))
    assert engine.step() == []
    assert launched == [["a"], ["a", "b", "c"]]
    engine.step()  # decodes are under way: the next step is launched before their tokens are there
    assert launched[2:] == [["a", "b", "c"]]
    run(engine)

    engine.add_request(request("d", prompt=tuple(range(20))))
    engine.add_request(request("e"))
    launched.clear()
    engine.step()
    engine.step()
    assert launched == [["d"], ["d"]]  # e waits behind d, and nobody else could join
    run(engine)


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_step_that_raises_ends_its_requests_and_no_others(
    make_engine: Callable[..., Engine],
    run: Run,
    expected_tokens: Expected,
    monkeypatch: pytest.MonkeyPatch,
    overlaps: bool,
) -> None:
    engine = make_engine(max_num_seqs=2, overlaps=overlaps, enable_prefix_cache=False)
    runner = engine._runner
    launch, launches = runner.launch, []

    def fail_in_launch(schedule: Schedule) -> Collect:
        launches.append(schedule)
        if len(launches) == 3:
            raise ValueError("no launch")
        collect = launch(schedule)
        return fail_in_collect if len(launches) == 6 else collect

    def fail_in_collect() -> list[SampledToken]:
        raise ValueError("no tokens")

    monkeypatch.setattr(runner, "launch", fail_in_launch)
    names = ("a", "b", "c", "d", "e")
    for name in names:
        engine.add_request(request(name, max_tokens=9))
    events: dict[str, list[TokenEvent]] = {name: [] for name in names}
    raised = []
    while engine.has_unfinished:
        try:
            for event in engine.step():
                events[event.request_id].append(event)
        except ValueError as error:
            raised.append(str(error))
        engine.scheduler.check_integrity()
    assert raised == ["no launch", "no tokens"]
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
    for name in names[:4]:
        assert [event.finish_reason for event in events[name]][-1] == "error"
        assert "the step that the request was in failed: ValueError: no" in (events[name][-1].error or "")
        num_tokens = len(events[name]) - 1
        assert num_tokens == (1 if overlaps and name in "ab" else 2), "a step under way when a launch fails is lost"
        assert tokens_in(events[name]) == [*expected_tokens([1, 2, 3], num_tokens), None]
    assert tokens_in(events["e"]) == expected_tokens([1, 2, 3], 9)


def test_logits_that_are_not_finite_end_one_request_in_an_error(
    make_engine: Callable[..., Engine], run: Run, expected_tokens: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    model = engine._runner._model
    forward = model.forward

    def spoil_first_row(*args: object) -> torch.Tensor:
        logits = forward(*args)  # type: ignore[arg-type]
        logits[0] = torch.nan
        return logits

    engine.add_request(request("bad"))
    engine.add_request(request("good", max_tokens=5))
    monkeypatch.setattr(model, "forward", spoil_first_row)
    first = engine.step()
    monkeypatch.undo()
    assert [(event.finish_reason, event.token_id) for event in first if event.request_id == "bad"] == [("error", None)]
    rest = run(engine)
    assert tokens_in([event for event in first if event.request_id == "good"] + rest["good", 0]) == expected_tokens(
        [1, 2, 3], 5
    )


def test_500_random_requests_with_random_aborts_leave_every_block_free(
    make_engine: Callable[..., Engine], expected_tokens: Expected
) -> None:
    rng = random.Random(0)
    engine = make_engine(num_blocks=30, max_num_seqs=6, max_num_batched_tokens=24, max_model_tokens=64)
    prompts: dict[str, tuple[int, ...]] = {}
    events: dict[tuple[str, int], list[TokenEvent]] = {}
    while len(prompts) < 500 or engine.has_unfinished:
        for _ in range(rng.randint(0, 2)):
            if len(prompts) < 500:
                request_id = f"r{len(prompts)}"
                start = rng.randint(0, 3)
                prompts[request_id] = tuple((start + i) % 50 for i in range(rng.randint(1, 50)))
                engine.add_request(
                    request(request_id, prompts[request_id], max_tokens=rng.randint(1, 12), n=rng.choice((1, 1, 1, 3)))
                )
        if rng.random() < 0.2:
            engine.abort(f"r{rng.randrange(500)}")
        for event in engine.step():
            events.setdefault((event.request_id, event.index), []).append(event)
        engine.scheduler.check_integrity()
    assert engine.block_manager.num_free_blocks == 30
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.num_prefix_hit_tokens > 0
    assert {request_id for request_id, _ in events} == set(prompts)
    for (request_id, _), each in events.items():
        tokens = [event.token_id for event in each if event.token_id is not None]
        assert tokens == expected_tokens(list(prompts[request_id]), len(tokens))
        assert [event.finish_reason for event in each if event.finish_reason] == [each[-1].finish_reason]
