from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from hasten.errors import RuntimeFailedError
from hasten.evaluate.greedy_match import generate_greedily, num_leading_equal
from hasten.request import Request, TokenEvent


class Counter:
    """Continues a prompt by counting on, events of the requests mixed."""

    config = SimpleNamespace(max_num_seqs=2)

    def __init__(self, num_tokens: int | None = None, error: str | None = None) -> None:
        self.num_tokens, self.error = num_tokens, error
        self.batch_sizes: list[int] = []

    def generate(self, requests: Sequence[Request]) -> list[TokenEvent]:
        self.batch_sizes.append(len(requests))
        if self.error:
            return [TokenEvent(requests[0].request_id, None, 0.0, finish_reason="error", error=self.error)]
        num_tokens = self.num_tokens or requests[0].sampling.max_tokens
        return [
            TokenEvent(request.request_id, request.prompt_token_ids[-1] + 1 + index, 0.0)
            for index in range(num_tokens)
            for request in requests
        ]


def greedy(process: Any) -> tuple[tuple[int, ...], ...]:
    return generate_greedily(process, [(1,), (5,), (9,)], 3)


def test_tokens_go_to_their_prompts_in_batches_that_fit() -> None:
    process = Counter()
    assert greedy(process) == ((2, 3, 4), (6, 7, 8), (10, 11, 12))
    assert process.batch_sizes == [2, 1]


@pytest.mark.parametrize(
    ("process", "message"), [(Counter(error="too long"), "too long"), (Counter(2), "gave 2 tokens")]
)
def test_anything_else_is_an_error(process: Counter, message: str) -> None:
    with pytest.raises(RuntimeFailedError, match=message):
        greedy(process)


def test_only_leading_equal_tokens_count() -> None:
    assert num_leading_equal([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert num_leading_equal([1], [1, 2]) == 1
    assert num_leading_equal([], [1]) == 0
