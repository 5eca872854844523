"""What is sent and when: lengths, arrivals, traces, prompts, and the options that ask for them."""

import random
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
from result_samples import make_result, make_run

from hasten.bench.arrivals import Lengths, arrival_times_s, read_trace
from hasten.bench.endpoints import OnlineRequest
from hasten.bench.metrics import errors_by_kind, goodput_per_s, peak_in_flight
from hasten.bench.online import Draws, Plan
from hasten.bench.pick import Gate, decide
from hasten.bench.prompts import PromptSource
from hasten.bench.result import BenchResult, Load, Objective, RequestRecord
from hasten.errors import UsageError
from hasten.pipeline.config import OnlineConfig

TEXT = " ".join(f"word{index % 97} and{index}" for index in range(4000))


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"),
    [("128", 128, 128, 128), ("64-256", 64, 256, 160), ("lognormal:100:0.5", 1, 1600, 113)],
)
def test_lengths_are_drawn_as_they_were_asked_for(text: str, low: int, high: int, mean: float) -> None:
    lengths = Lengths.parse(text, "--new-tokens")
    drawn = [lengths.draw(random.Random(seed)) for seed in range(4000)]
    assert low <= min(drawn) <= max(drawn) <= high
    assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.03)
    assert lengths.mean == pytest.approx(mean, rel=0.01)


@pytest.mark.parametrize("text", ["", "0", "9-3", "-3", "lognormal:0:1", "normal:3:1", "12.5", "3000000000"])
def test_lengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--new-tokens"):
        Lengths.parse(text, "--new-tokens")


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    times = list(islice(arrival_times_s("poisson", 20.0, random.Random(1)), 5001))
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert times[0] == 0.0
    assert mean == pytest.approx(0.05, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.05)


def test_constant_arrivals_are_equally_far_apart() -> None:
    assert list(islice(arrival_times_s("constant", 4.0, random.Random()), 4)) == [0.0, 0.25, 0.5, 0.75]


def test_a_trace_is_read_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"arrival_s": 0, "prompt_tokens": 5, "output_tokens": 2}\n\n'
        '{"arrival_s": 1.5, "prompt_tokens": 6, "output_tokens": 3}\n'
    )
    plan = make_plan(trace=read_trace(path))
    requests = Draws(plan, PromptSource.of_words(TEXT)).run("r", 1)
    assert [(each.arrival_s, each.num_prompt_tokens, each.num_tokens) for each in requests] == [(0, 5, 2), (1.5, 6, 3)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"arrival_s": 0, "prompt_tokens": 5}', "line 1: .*output_tokens"),
        ('\n{"arrival_s": 0, "prompt_tokens": 0, "output_tokens": 1}', "line 2"),
        ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "more": 1}', "more"),
        ("", "has no requests"),
        (
            '{"arrival_s": 2, "prompt_tokens": 1, "output_tokens": 1}\n'
            '{"arrival_s": 1, "prompt_tokens": 1, "output_tokens": 1}',
            "goes back in time",
        ),
    ],
)
def test_a_trace_that_is_wrong_is_refused_with_the_line(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(lines)
    with pytest.raises(UsageError, match=message):
        read_trace(path)


def make_plan(**fields: object) -> Plan:
    plan = Plan(Lengths.parse("16-64", ""), Lengths.parse("8", ""), (1, 4), 3, 2, 1, 0, 10.0)
    return replace(plan, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_random", [False, True])
def test_prompts_have_their_lengths_and_no_two_begin_alike(is_random: bool) -> None:
    source = PromptSource.of_words(TEXT).measured(num_units=50, num_tokens=100)
    draws = Draws(make_plan(is_random=is_random), source)
    requests = [each for _ in range(20) for each in draws.run("r", 4)]
    beginnings = [tuple(str(each.prompt).split()[:8]) for each in requests]
    assert len(set(beginnings)) == len(requests) == 240
    for each in requests:
        assert len(str(each.prompt).split()) == pytest.approx(each.num_prompt_tokens / 2, abs=1)


def test_the_same_seed_sends_the_same_and_another_does_not() -> None:
    def drawn(seed: int) -> tuple[OnlineRequest, ...]:
        return Draws(make_plan(seed=seed, rate_per_s=5.0), PromptSource.of_words(TEXT)).run("r", 1)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert len(drawn(1)) == 3, "an open loop's run has num_requests in all"


class Letters:
    """A tokenizer of letters."""

    all_special_ids = (0,)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: tuple[int, ...]) -> str:
        return "".join(map(chr, ids))


def test_with_a_tokenizer_lengths_are_exact_and_ids_can_be_sent() -> None:
    source = PromptSource.of_tokens(TEXT, Letters(), 128)
    text = Draws(make_plan(), source).run("r", 4)
    assert all(len(each.prompt) == each.num_prompt_tokens and str(each.prompt) in TEXT for each in text)
    ids = Draws(make_plan(is_random=True, as_ids=True), source).run("r", 4)
    assert all(len(each.prompt) == each.num_prompt_tokens and 0 not in each.prompt for each in ids)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"concurrency": (0,)}, "--concurrency"),
        ({"rate": 0.0}, "--rate"),
        ({"rate": 1.0, "trace": Path("t")}, "exclude each other"),
        ({"requests": 4, "trace": Path("t")}, "exclude each other"),
        ({"slo_ttft_ms": -1.0}, "--slo-ttft-ms"),
        ({"runs": 0}, "--runs"),
        ({"timeout": float("inf")}, "--timeout"),
    ],
)
def test_options_that_make_no_sense_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OnlineConfig(url="http://127.0.0.1:1", **fields)


def online_result(objective: Objective, *, failed: int = 0) -> BenchResult:
    """Two runs of two requests: first token after 0.1 s, four more 0.1 s apart, so a run lasts 0.5 s."""
    load = Load("http://h:1", "chat", "closed", None, 1, "text", "8", "5", objective)
    runs = [make_run(0.1, concurrency=2, round_index=index) for index in range(2)]
    broken = RequestRecord("broken", 8, 10.0, (), "error", "the server answered 429 Too Many Requests")
    runs[0] = replace(runs[0], requests=(*runs[0].requests[failed:], *(failed * [broken])))
    result = make_result("server", "", [0.1], runs=runs, concurrency=(2,))
    return replace(result, config=replace(result.config, load=load, num_threads=None))


@pytest.mark.parametrize(
    ("objective", "good"),
    [
        (Objective(ttft_s=0.11), 2),
        (Objective(ttft_s=0.09), 0),
        (Objective(tpot_s=0.11, e2e_latency_s=0.51), 2),
        (Objective(ttft_s=0.11, tpot_s=0.09), 0),
        (Objective(e2e_latency_s=0.4), 0),
    ],
)
def test_goodput_counts_what_keeps_every_part_of_the_objective(objective: Objective, good: int) -> None:
    goodput = goodput_per_s(online_result(objective), 2)
    assert goodput is not None
    assert goodput.median == pytest.approx(good / 0.5)
    assert goodput.num_samples == 2


def test_goodput_has_the_runs_in_which_requests_failed_too() -> None:
    goodput = goodput_per_s(online_result(Objective(ttft_s=1.0), failed=1), 2)
    assert goodput is not None and goodput.median == pytest.approx((1 + 2) / 2 / 0.5)
    assert goodput_per_s(online_result(Objective()), 2) is None
    assert errors_by_kind(online_result(Objective(), failed=2), 2) == {"the server answered 429 Too Many Requests": 2}


def test_requests_in_flight_are_counted_at_their_most() -> None:
    def record(start_s: float, end_s: float) -> RequestRecord:
        return RequestRecord("r", 1, start_s, (end_s,), "length")

    run = make_run(0.1)
    assert peak_in_flight(replace(run, requests=(record(0, 2), record(1, 3), record(2, 4), record(5, 6)))) == 2
    assert peak_in_flight(replace(run, requests=())) == 0


def test_a_server_is_named_as_it_is_and_judged_against_a_runtime() -> None:
    server = online_result(Objective())
    offline = make_result("native", "bf16", [0.2], runs=[make_run(0.2, concurrency=2)], concurrency=(2,))
    assert server.candidate.name == "server"
    [_, verdict] = decide([offline, server], "native-bf16", Gate("throughput")).verdicts
    assert verdict.speedup is not None and verdict.speedup > 1
    assert server.config.load is not None
    open_loop = replace(server.config, load=replace(server.config.load, arrivals="poisson", rate_per_s=8.0))
    [_, verdict] = decide([offline, replace(server, config=open_loop)], "native-bf16", Gate("throughput")).verdicts
    assert "its load is open loop, poisson, 8 requests/s" in verdict.reason
