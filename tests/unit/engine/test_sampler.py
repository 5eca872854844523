"""The sampler against transformers' logits processors, and its draw against the distribution."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hasten.engine.sampler import draw, filter_scores, penalize, sample
from hasten.engine.sequence import Sequence, make_sequences, uniform
from hasten.request import Request, SamplingParams

VOCAB_SIZE = 3000  # more than top-p looks at first


def sequence_with(prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), **sampling: object) -> Sequence:
    (sequence,) = make_sequences(Request("r", prompt, SamplingParams(**sampling)), 0, (), 10_000)
    sequence.token_ids.extend(output)
    return sequence


def random_logits(num_rows: int, scale: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * scale


def generate(sequence: Sequence, logits: torch.Tensor, num_tokens: int) -> list[int]:
    """Tokens drawn one after the other from the same logits."""
    for _ in range(num_tokens):
        sequence.token_ids.append(sample(logits.clone(), [sequence])[0].token_id)
    return sequence.token_ids[sequence.num_prompt_tokens :]


def kept(scores: torch.Tensor) -> torch.Tensor:
    return scores > -math.inf


def test_greedy_takes_the_largest_logit() -> None:
    logits = random_logits(5, 1.0)
    best = logits.argmax(-1).tolist()
    assert [token.token_id for token in sample(logits, [sequence_with()] * 5)] == best


@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(1, 2.0)
    prompt, output = [5, 6, 5, 7], [8, 8, 9]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits.clone())
    penalize(logits[0], SamplingParams(repetition_penalty=penalty), prompt + output, len(prompt))
    assert torch.equal(logits, expected)


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    logits = torch.zeros(10)
    penalize(logits, SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), [1, 2, 2, 3, 3, 3, 4], 3)
    assert logits.tolist() == [0, 0, 0, -0.5 - 3 * 0.25, -0.5 - 0.25, 0, 0, 0, 0, 0]


def test_penalties_change_what_greedy_takes() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 3], logits[0, 4] = 1.0, 0.9
    (token,) = sample(logits, [sequence_with(output=(3,), presence_penalty=0.5)])
    assert token.token_id == 4


def test_biases_are_those_of_transformers_and_of_their_row_alone() -> None:
    logits = random_logits(3, 2.0)
    bias = {5: 3.5, 7: -100.0, 2999: 0.25}
    expected = logits.clone()
    expected[1:2] = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})(
        torch.tensor([[1]]), logits[1:2].clone()
    )
    sample(logits, [sequence_with(), sequence_with(logit_bias=tuple(bias.items())), sequence_with()])
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_bias_decides_what_is_chosen(temperature: float) -> None:
    wanted = sequence_with(temperature=temperature, logit_bias=((42, 100.0),))
    best = int(random_logits(1, 1.0).argmax())
    unwanted = sequence_with(temperature=temperature, logit_bias=((best, -100.0),))
    tokens = [sample(random_logits(2, 1.0)[:1].repeat(2, 1), [wanted, unwanted]) for _ in range(20)]
    assert {first.token_id for first, _ in tokens} == {42}
    assert best not in {second.token_id for _, second in tokens}


def test_logprobs_are_after_biases() -> None:
    logits = random_logits(1, 1.0)
    biased = logits.clone()
    biased[0, 42] += 10.0
    (token,) = sample(logits, [sequence_with(logprobs=2, logit_bias=((42, 10.0),))])
    assert (token.token_id, token.logprob) == (42, biased.log_softmax(-1)[0, 42].item())


def test_no_end_before_min_tokens() -> None:
    request = Request("r", (1, 2), SamplingParams(min_tokens=2, stop_token_ids=(6,)))
    (sequence,) = make_sequences(request, 0, (7,), 10_000)
    logits = torch.zeros(1, 10)
    logits[0, 6], logits[0, 7], logits[0, 3] = 3.0, 2.0, 1.0
    assert generate(sequence, logits, 3) == [3, 3, 6]


@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 1}, [TopKLogitsWarper(1)]),
        ({"temperature": 1.0, "top_k": 40}, [TopKLogitsWarper(40)]),
        ({"temperature": 1.0, "top_k": VOCAB_SIZE + 5}, []),
        ({"temperature": 1.0, "top_p": 1e-9}, [TopPLogitsWarper(1e-9)]),
        ({"temperature": 1.0, "top_p": 0.3}, [TopPLogitsWarper(0.3)]),
        ({"temperature": 1.0, "top_p": 0.95}, [TopPLogitsWarper(0.95)]),
        ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"temperature": 1.0, "min_p": 1.0}, [MinPLogitsWarper(1.0)]),
        (
            {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(50), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
    ],
)
def test_filters_are_those_of_transformers(scale: float, sampling: dict, warpers: list[LogitsProcessor]) -> None:
    logits = random_logits(4, scale)
    expected = logits.clone()
    for warper in warpers:
        expected = warper(torch.zeros(4, 1, dtype=torch.int64), expected)
    filter_scores(logits, [SamplingParams(**sampling)] * 4)
    # transformers sums from the least probable token, so a border may fall one token apart
    assert (kept(logits) != kept(expected)).sum() <= (1 if "top_p" in sampling else 0)
    both = kept(logits) & kept(expected)
    torch.testing.assert_close(logits[both], expected[both])


def test_rows_are_filtered_by_their_own_parameters() -> None:
    samplings = [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5, top_k=3),
        SamplingParams(temperature=2.0, top_p=0.5),
        SamplingParams(temperature=1.0, min_p=0.2, top_k=700),
    ]
    together = random_logits(4, 3.0)
    alone = together.clone()
    filter_scores(together, samplings)
    for row, sampling in enumerate(samplings):
        filter_scores(alone[row : row + 1], [sampling])
    assert torch.equal(together, alone)
    assert kept(together).sum(-1)[:2].tolist() == [VOCAB_SIZE, 3]


def test_top_p_looks_beyond_its_first_candidates() -> None:
    scores = torch.zeros(1, VOCAB_SIZE) - torch.arange(VOCAB_SIZE) * 1e-4  # almost flat
    filter_scores(scores, [SamplingParams(temperature=1.0, top_p=0.9)])
    probabilities = (-torch.arange(VOCAB_SIZE) * 1e-4).double().softmax(-1)
    num_kept = int(kept(scores).sum())
    assert probabilities[: num_kept - 1].sum() < 0.9 <= probabilities[:num_kept].sum() + 1e-6


def test_draw_follows_the_distribution() -> None:
    scores = torch.tensor([2.0, 1.0, -math.inf, 0.0, -1.0, 1.5, -math.inf, -2.0])
    num_draws = 20_000
    counts = torch.zeros(8)
    for token_id in draw(scores.expand(num_draws, -1), [uniform(1, index) for index in range(num_draws)]):
        counts[token_id] += 1
    expected = scores.softmax(-1) * num_draws
    assert counts[~kept(scores)].sum() == 0
    chi_squared = ((counts - expected)[kept(scores)] ** 2 / expected[kept(scores)]).sum()
    assert chi_squared < 20.5  # 5 degrees of freedom, probability 0.001


@pytest.mark.parametrize(("number", "token_id"), [(0.0, 1), (1.0 - 2.0**-53, 2)])
def test_draw_never_takes_a_dropped_token(number: float, token_id: int) -> None:
    scores = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    assert draw(scores, [number]) == [token_id]


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-9])
@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.5}])
def test_a_tiny_temperature_takes_the_largest_logit(temperature: float, sampling: dict) -> None:
    logits = random_logits(2, 30.0)
    best = logits.argmax(-1).tolist()
    sequences = [sequence_with(temperature=temperature, seed=5, **sampling), sequence_with(temperature=1.0, seed=6)]
    alone = sample(logits[1:].clone(), sequences[1:])
    assert [token.token_id for token in sample(logits, sequences)] == [best[0], alone[0].token_id]


def test_random_numbers_are_uniform_and_independent_of_each_other() -> None:
    first, second, later = (
        torch.tensor([uniform(seed, index) for index in range(start, start + 20_000)], dtype=torch.float64)
        for seed, start in ((0, 0), (1, 0), (0, 1))
    )
    counts = torch.histc(first, 16, 0.0, 1.0)
    assert ((counts - 1250) ** 2 / 1250).sum() < 37.7  # 15 degrees of freedom, probability 0.001
    assert first.min() >= 0.0
    assert first.max() < 1.0
    for other in (second, later):  # of another seed, and of the next token
        assert abs(torch.corrcoef(torch.stack((first, other)))[0, 1]) < 0.025


def test_random_numbers_never_change() -> None:
    # SplitMix64's published outputs for the state 1234567: a seed must mean the same tokens for ever.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [uniform(1234567, index) for index in range(3)] == [(each >> 11) / 2**53 for each in published]


def test_a_seed_gives_the_same_tokens_beside_any_others() -> None:
    logits = random_logits(3, 1.0)
    sampling = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    alone = generate(sequence_with(**sampling), logits[:1], 20)
    beside = [sequence_with(**sampling), sequence_with(temperature=1.0, seed=8), sequence_with()]
    for _ in range(20):
        for sequence, token in zip(beside, sample(logits.clone(), beside), strict=True):
            sequence.token_ids.append(token.token_id)
    assert beside[0].token_ids[2:] == alone
    assert len(set(alone)) > 10
    assert set(beside[2].token_ids[2:]) == {int(logits[2].argmax())}


def test_continuations_and_seeds_draw_differently() -> None:
    def tokens_of(sequence: Sequence) -> tuple[int, ...]:
        return tuple(generate(sequence, random_logits(1, 0.1), 8))

    request = Request("r", (1,), SamplingParams(temperature=1.0, seed=3, n=3))
    drawn = [tokens_of(sequence) for sequence in make_sequences(request, 0, (), 100)]
    drawn += [tokens_of(sequence_with(temperature=1.0, seed=seed)) for seed in (4, 5)]
    drawn += [tokens_of(sequence_with(temperature=1.0)) for _ in range(2)]
    assert len(set(drawn)) == len(drawn)
    assert drawn[0] == tokens_of(sequence_with(temperature=1.0, seed=3))


def test_logprobs_are_after_penalties_and_before_temperature() -> None:
    logits = random_logits(1, 2.0)
    expected = logits.clone()
    penalize(expected[0], SamplingParams(presence_penalty=1.0), [1, 2, 5], 2)
    expected = expected.log_softmax(-1)[0]
    sequence = sequence_with(output=(5,), temperature=3.0, top_k=2, seed=0, presence_penalty=1.0, logprobs=4)
    (token,) = sample(logits, [sequence])
    best = expected.topk(4)
    assert token.logprob == pytest.approx(expected[token.token_id].item(), abs=1e-6)
    assert [token_id for token_id, _ in token.top_logprobs] == best.indices.tolist()
    assert [value for _, value in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 0, "logprobs": 1}])
def test_logits_that_are_not_finite_are_an_error_of_their_row_alone(value: float, sampling: dict) -> None:
    logits = random_logits(2, 1.0)
    logits[0, 17] = value
    first, second = sample(logits, [sequence_with(**sampling), sequence_with(**sampling)])
    assert first.error is not None
    assert second.error is None
