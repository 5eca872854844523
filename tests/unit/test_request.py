import math

import pytest

from hasten.errors import RequestError
from hasten.request import MAX_GRAMMAR_CHARS, Grammar, Request, SamplingParams


def test_default_is_greedy() -> None:
    assert SamplingParams().is_greedy
    assert not SamplingParams(temperature=0.7).is_greedy


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", (0, -1)),
        ("min_tokens", (-1, 129)),
        ("temperature", (-0.1, math.nan, math.inf)),
        ("top_k", (0, -1)),
        ("top_p", (0.0, 1.1, math.nan)),
        ("min_p", (-0.1, 1.1)),
        ("repetition_penalty", (0.0, -1.0)),
        ("presence_penalty", (-2.1, 2.1)),
        ("frequency_penalty", (-2.1, 2.1, math.nan)),
        ("logprobs", (-1, 21)),
        ("prompt_logprobs", (-1, 21)),
        ("n", (0, 129)),
    ],
)
def test_value_out_of_range_names_the_field_and_the_range(name: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=f"{name} must be (at least|between) .*, got"):
            SamplingParams(**{name: value})


def test_edges_of_the_ranges_are_allowed() -> None:
    SamplingParams(max_tokens=1, temperature=0.0, top_k=1, top_p=1.0, min_p=1.0, logprobs=20, n=128)


@pytest.mark.parametrize(
    ("biases", "reason"),
    [
        (((5, 100.5),), "a logit_bias must be between -100 and 100"),
        (((5, math.nan),), "a logit_bias must be between -100 and 100"),
        (((5, 1.0), (5, 1.0)), "logit_bias names a token twice"),
    ],
)
def test_a_bias_beyond_its_range_is_refused(biases: tuple[tuple[int, float], ...], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        SamplingParams(logit_bias=biases)


def test_empty_stop_string_and_empty_prompt_are_refused() -> None:
    with pytest.raises(RequestError, match="a stop string must not be empty"):
        SamplingParams(stop=("end", ""))
    with pytest.raises(RequestError, match="request r1: the prompt is empty"):
        Request("r1", ())


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("yaml", "a: b", "a grammar is one of json_object, json_schema, regex, lark, got 'yaml'"),
        ("regex", "", "a grammar of kind regex needs a text"),
        ("json_object", "{}", "a grammar of kind json_object takes no text"),
        ("json_schema", '{"type":', "the json_schema is not valid JSON: Expecting value"),
        ("json_schema", "[" * 60_000, "the json_schema is not valid JSON"),
        ("json_schema", "true", "a json_schema is a JSON object, got true"),
        ("regex", "a" * (MAX_GRAMMAR_CHARS + 1), "the regex has 65537 characters and at most 65536 are allowed"),
    ],
)
def test_the_form_of_a_grammar_is_checked_when_it_is_made(kind: str, text: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        Grammar(kind, text)  # type: ignore[arg-type]
