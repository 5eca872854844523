"""Likelihood of the held-out text under a model.

    perplexity = exp(mean of -ln p(token))
    bits_per_byte = sum of -log2 p(token) / UTF-8 bytes of those tokens

Perplexity depends on how the tokenizer cuts the text, bits per byte does not.
"""

import math

import numpy as np

from hasten.errors import RuntimeFailedError

# float16 sums over a vocabulary stay well within this; logits instead of log-probabilities do not
MAX_LOG_SUM = 0.05


def check_logprobs(logprobs: np.ndarray, num_tokens: int, vocab_size: int | None) -> None:
    """Whether an array can be the answer of `Runtime.score` for one sequence.

    Args:
        vocab_size: that of the baseline, None where there is none to compare with.

    Raises:
        RuntimeFailedError: another shape, a value that is not a number, or rows that are no
            distribution.
    """
    if logprobs.ndim != 2 or len(logprobs) != num_tokens or logprobs.shape[1] != (vocab_size or logprobs.shape[1]):
        expected = f"[{num_tokens}, {vocab_size or 'vocab_size'}]"
        raise RuntimeFailedError(f"scores have shape {list(logprobs.shape)}, {expected} was expected")
    for rows in row_chunks(logprobs):
        log_sums = np.log(np.exp(rows).sum(axis=-1))
        if np.isnan(rows).any() or not (np.abs(log_sums) <= MAX_LOG_SUM).all():
            raise RuntimeFailedError("scores are not log-probabilities: a row's probabilities do not add up to 1")


def row_chunks(logprobs: np.ndarray, max_bytes: int = 8 * 2**20) -> list[np.ndarray]:
    """Views of consecutive rows, each of which fits max_bytes as float64."""
    num_rows = max(1, max_bytes // (8 * logprobs.shape[1]))
    return [logprobs[start : start + num_rows] for start in range(0, len(logprobs), num_rows)]


def negative_log_likelihood(logprobs: np.ndarray, token_ids: np.ndarray) -> float:
    """Sum of -ln p over tokens, in nats.

    Args:
        logprobs: [num_tokens, vocab_size]; row i is the distribution of token_ids[i].
    """
    return -float(logprobs[np.arange(len(token_ids)), token_ids].sum(dtype=np.float64))


def perplexity(nll: float, num_tokens: int) -> float:
    """Raises RuntimeFailedError if the text is impossible under the model."""
    mean = nll / num_tokens
    if not mean < 700:  # exp of more is no float
        raise RuntimeFailedError(f"the held-out text is impossible for the model: {mean} nats a token")
    return math.exp(mean)


def bits_per_byte(nll: float, num_bytes: int) -> float:
    return nll / math.log(2) / num_bytes
