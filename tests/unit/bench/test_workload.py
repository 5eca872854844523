import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.bench.result import BenchConfig
from hasten.bench.workload import DISTINCT_TOKENS, sample_requests
from hasten.errors import UsageError


def make_config(prompt_tokens: int = 16, concurrency: tuple[int, ...] = (1, 4), seed: int = 0) -> BenchConfig:
    return BenchConfig(prompt_tokens, 5, concurrency, num_runs=3, num_warmup=2, num_threads=1, seed=seed)


@given(st.integers(0, 300), st.integers(DISTINCT_TOKENS, 40), st.integers(0, 5))
@settings(max_examples=50)
def test_every_prompt_has_its_length_and_a_beginning_of_its_own(
    text_length: int, prompt_tokens: int, seed: int
) -> None:
    text = [(31 * index + 7) % 251 for index in range(text_length)]
    plan = sample_requests(make_config(prompt_tokens, seed=seed), 256, text, special_token_ids={0, 1})
    requests = [request for run in plan for request in run.requests]
    assert len(requests) == 5 * (1 + 4)
    assert len({request.request_id for request in requests}) == len(requests)
    assert len({request.prompt_token_ids[:DISTINCT_TOKENS] for request in requests}) == len(requests)
    for request in requests:
        assert len(request.prompt_token_ids) == prompt_tokens
        assert (request.sampling.max_tokens, request.sampling.ignore_eos) == (5, True)
        assert request.sampling.is_greedy


def test_the_seed_decides() -> None:
    text = list(range(200))
    assert sample_requests(make_config(), 256, text) == sample_requests(make_config(), 256, text)
    assert sample_requests(make_config(), 256, text) != sample_requests(make_config(seed=1), 256, text)


def test_prompts_are_windows_of_the_text() -> None:
    for run in sample_requests(make_config(), 1000, range(1000)):
        for request in run.requests:
            first = request.prompt_token_ids[0]
            assert request.prompt_token_ids == tuple(range(first, first + 16))


def test_a_text_that_repeats_itself_gives_no_prompt_twice() -> None:
    plan = sample_requests(make_config(), 256, [1, 2, 3] * 100)
    prompts = {request.prompt_token_ids for run in plan for request in run.requests}
    assert len(prompts) == 25


def test_random_tokens_are_never_special() -> None:
    plan = sample_requests(make_config(), 8, special_token_ids={0, 1, 2, 3})
    assert {token for run in plan for request in run.requests for token in request.prompt_token_ids} == {4, 5, 6, 7}


def test_a_vocabulary_of_special_tokens_is_an_error() -> None:
    with pytest.raises(UsageError, match="special"):
        sample_requests(make_config(), 4, special_token_ids={0, 1, 2, 3})


def test_very_short_prompts_may_repeat_rather_than_never_end() -> None:
    assert len(sample_requests(make_config(prompt_tokens=1), 4)) == 10


def test_warmups_come_first_and_every_round_has_every_concurrency() -> None:
    plan = sample_requests(make_config(), 256)
    order = [(run.is_warmup, run.round_index, run.concurrency) for run in plan]
    assert order == [(True, r, c) for r in range(2) for c in (1, 4)] + [(False, r, c) for r in range(3) for c in (1, 4)]
    assert all(len(run.requests) == run.concurrency for run in plan)
