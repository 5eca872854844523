import math

import numpy as np
import pytest

from hasten.errors import RuntimeFailedError
from hasten.evaluate.perplexity import bits_per_byte, check_logprobs, negative_log_likelihood, perplexity, row_chunks


def uniform(num_rows: int, vocab_size: int) -> np.ndarray:
    return np.full((num_rows, vocab_size), -math.log(vocab_size), dtype=np.float32)


def test_a_uniform_distribution_has_the_vocabularys_perplexity() -> None:
    nll = negative_log_likelihood(uniform(10, 16), np.arange(10))
    assert perplexity(nll, 10) == pytest.approx(16)
    assert bits_per_byte(nll, 20) == pytest.approx(2)


def test_likelihood_reads_the_row_of_each_token() -> None:
    logprobs = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], dtype=np.float32))
    assert negative_log_likelihood(logprobs, np.array([0, 2])) == pytest.approx(-math.log(0.5 * 0.8), rel=1e-6)


@pytest.mark.parametrize(
    "bad",
    [uniform(4, 8), uniform(5, 7), uniform(5, 8)[0], uniform(5, 8) * math.nan, uniform(5, 8) + 1, -uniform(5, 8)],
    ids=["rows", "vocabulary", "dimensions", "nan", "logits", "sign"],
)
def test_what_is_no_distribution_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(RuntimeFailedError, match="scores"):
        check_logprobs(bad, 5, 8)


def test_a_distribution_is_accepted() -> None:
    check_logprobs(uniform(5, 8), 5, None)
    certain = np.full((5, 8), -math.inf, dtype=np.float32)
    certain[:, 0] = 0
    check_logprobs(certain, 5, 8)


def test_chunks_are_all_rows_in_order() -> None:
    rows = np.arange(30.0).reshape(10, 3)
    chunks = row_chunks(rows, max_bytes=100)
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]
    assert np.array_equal(np.concatenate(chunks), rows)
    assert len(row_chunks(rows, max_bytes=1)) == 10


@pytest.mark.parametrize("nll", [math.inf, math.nan, 1e6])
def test_an_impossible_text_is_an_error(nll: float) -> None:
    with pytest.raises(RuntimeFailedError, match="impossible"):
        perplexity(nll, 10)
