"""Distance between the distributions of a candidate and of the baseline.

    KL(baseline || candidate) = sum over tokens of p ln(p / q)

with p the baseline's probability of the next token and q the candidate's, at each position of
the held-out text; the mean over positions is reported. It notices what perplexity averages away.
"""

import numpy as np

from hasten.errors import RuntimeFailedError
from hasten.evaluate.perplexity import row_chunks


def kl_divergence(baseline: np.ndarray, candidate: np.ndarray) -> float:
    """Sum over positions, in nats.

    Args:
        baseline, candidate: log-probabilities [num_positions, vocab_size].

    Raises:
        RuntimeFailedError: the candidate rules out what the baseline thinks possible.
    """
    total = 0.0
    for p_log, q_log in zip(row_chunks(baseline), row_chunks(candidate), strict=True):
        p = np.exp(p_log, dtype=np.float64)
        is_possible = p > 0
        difference = np.subtract(p_log, q_log, out=np.zeros_like(p), where=is_possible)
        total += float((p * difference).sum())
    if not np.isfinite(total):
        raise RuntimeFailedError("scores give no chance to a token that is possible for the baseline")
    return max(0.0, total)  # rounding may leave a negative rest of two equal distributions


def num_top1_equal(baseline: np.ndarray, candidate: np.ndarray) -> int:
    """Positions at which both have the same most probable token."""
    return int((baseline.argmax(axis=-1) == candidate.argmax(axis=-1)).sum())
