"""What is added to logits before anything else but a grammar looks at them.

A request's own biases, and -inf for the tokens that would end an output of fewer than `min_tokens`. With a grammar the
matcher holds those back, because it knows where nothing else can follow.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from hasten.engine.sequence import Sequence


def biases(rows: Iterable[tuple[Sequence, int]]) -> dict[int, dict[int, float]]:
    """What to add, by row and token id; rows without any are left out.

    Args:
        rows: the sequences, each with the number of output tokens before the one that is to be chosen.
    """
    return {row: added for row, (sequence, count) in enumerate(rows) if (added := _biases_of(sequence, count))}


def add_biases(
    logits: torch.Tensor,
    added: dict[int, dict[int, float]],
    to_device: Callable[[np.ndarray], torch.Tensor] = torch.from_numpy,
) -> None:
    """Adds them in place.

    Args:
        logits: [rows, vocab_size] float32.
        to_device: gives an array to the logits' device.
    """
    places = [(row, token_id) for row, tokens in added.items() for token_id in tokens]
    rows, token_ids = to_device(np.array(places, dtype=np.int64).T.copy())
    values = to_device(np.array([value for tokens in added.values() for value in tokens.values()], dtype=np.float32))
    logits.index_put_((rows, token_ids), values, accumulate=True)


def _biases_of(sequence: Sequence, num_output_tokens: int) -> dict[int, float]:
    sampling = sequence.sampling
    if num_output_tokens >= sampling.min_tokens or sequence.matcher is not None:
        return dict(sampling.logit_bias) if sampling.logit_bias else {}
    return dict(sampling.logit_bias) | dict.fromkeys(sequence.stop_token_ids, -math.inf)
