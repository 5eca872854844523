import json
from pathlib import Path

import pytest

from hasten.request import Grammar, Request, SamplingParams
from hasten.runtimes.continuation import ModelLimits, admit, eos_token_ids, error_events, refusal

LIMITS = ModelLimits(vocab_size=100, max_model_tokens=10, eos_token_ids=frozenset({2}), samples=False)


def test_a_continuation_ends_at_the_models_limit() -> None:
    (continuation,), refused = admit([Request("r", (1,) * 7, SamplingParams(max_tokens=50))], LIMITS)
    assert not refused
    assert [continuation.accept(5, float(n)).finish_reason for n in range(3)] == [None, None, "length"]


@pytest.mark.parametrize(
    ("sampling", "token", "reason"),
    [
        (SamplingParams(), 2, "stop"),
        (SamplingParams(ignore_eos=True), 2, None),
        (SamplingParams(stop_token_ids=(7,)), 7, "stop"),
        (SamplingParams(ignore_eos=True, stop_token_ids=(2,)), 2, "stop"),
        (SamplingParams(max_tokens=1), 9, "length"),
        (SamplingParams(max_tokens=1), 2, "stop"),
    ],
)
def test_what_ends_a_continuation(sampling: SamplingParams, token: int, reason: str | None) -> None:
    (continuation,), _ = admit([Request("r", (1,), sampling)], LIMITS)
    assert continuation.accept(token, 1.0).finish_reason == reason


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("r", (1,) * 10), "10 tokens"),
        (Request("r", (1, 100)), "outside the vocabulary"),
        (Request("r", (1, -1)), "outside the vocabulary"),
        (Request("r", (1,), SamplingParams(temperature=0.5)), "greedy"),
        (Request("r", (1,), SamplingParams(repetition_penalty=1.1)), "greedy"),
        (Request("r", (1,), SamplingParams(logprobs=1)), "log-probabilities"),
        (Request("r", (1,), SamplingParams(grammar=Grammar("regex", "a"))), "does not follow grammars"),
        (Request("r", (1,), SamplingParams(logit_bias=((1, 1.0),))), "takes neither logit_bias nor min_tokens"),
        (Request("r", (1,), SamplingParams(min_tokens=1)), "takes neither logit_bias nor min_tokens"),
        (Request("r", (1,), SamplingParams(prompt_logprobs=0)), "does not report log-probabilities of prompts"),
    ],
)
def test_what_is_refused_and_why(request_: Request, words: str) -> None:
    assert words in (refusal(request_, LIMITS) or "")


def test_each_continuation_of_a_refused_request_ends_in_an_error() -> None:
    _, refused = admit([Request("r", (1,) * 10, SamplingParams(n=3)), Request("ok", (1,))], LIMITS)
    events = error_events(refused, 1.5)
    assert [(event.request_id, event.index, event.finish_reason) for event in events] == [
        ("r", index, "error") for index in range(3)
    ]


def test_the_generation_config_goes_before_the_config(tmp_path: Path) -> None:
    assert eos_token_ids(tmp_path) == frozenset()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert eos_token_ids(tmp_path) == {2}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert eos_token_ids(tmp_path) == {3, 4}
