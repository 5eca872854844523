import math

import pytest

from hasten.errors import RequestError
from hasten.request import Request, SamplingParams


def test_default_is_greedy() -> None:
    assert SamplingParams().is_greedy
    assert not SamplingParams(temperature=0.7).is_greedy


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", (0, -1)),
        ("temperature", (-0.1, math.nan, math.inf)),
        ("top_k", (0, -1)),
        ("top_p", (0.0, 1.1, math.nan)),
        ("min_p", (-0.1, 1.1)),
        ("repetition_penalty", (0.0, -1.0)),
        ("presence_penalty", (-2.1, 2.1)),
        ("frequency_penalty", (-2.1, 2.1, math.nan)),
        ("logprobs", (-1, 21)),
        ("n", (0, 129)),
    ],
)
def test_value_out_of_range_names_the_field_and_the_range(name: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=f"{name} must be (at least|between) .*, got"):
            SamplingParams(**{name: value})


def test_edges_of_the_ranges_are_allowed() -> None:
    SamplingParams(max_tokens=1, temperature=0.0, top_k=1, top_p=1.0, min_p=1.0, logprobs=20, n=128)


def test_empty_stop_string_and_empty_prompt_are_refused() -> None:
    with pytest.raises(RequestError, match="a stop string must not be empty"):
        SamplingParams(stop=("end", ""))
    with pytest.raises(RequestError, match="request r1: the prompt is empty"):
        Request("r1", ())
