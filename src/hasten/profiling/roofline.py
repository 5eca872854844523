"""The limit that memory sets to decoding.

A decode step at batch 1 reads every weight once, and little else:

    step_s >= weight bytes a token / read bandwidth
    tokens a second <= read bandwidth / weight bytes a token

The KV cache adds to the bytes as the context grows, see `kv_read_bytes`; the limit leaves it out.
A model that fits the processor's caches can be faster than its memory allows, and its share of the
limit then passes 1.
(Williams et al., "Roofline: An Insightful Visual Performance Model", CACM 52(4), 2009.)
"""

from hasten.models.config import DecoderConfig


def max_tokens_per_s(weight_bytes_per_token: int, bandwidth_bytes_per_s: float) -> float:
    """Most tokens a second of one request on this machine."""
    return bandwidth_bytes_per_s / weight_bytes_per_token


def achieved_bytes_per_s(weight_bytes_per_token: int, step_s: float) -> float:
    """Rate at which a step that takes step_s reads the weights."""
    return weight_bytes_per_token / step_s


def kv_read_bytes(decoder: DecoderConfig, context_tokens: float, bytes_each: int) -> int:
    """Keys and values that one decode step reads for one sequence.

    Args:
        context_tokens: positions that it attends to, where no window ends them earlier.
        bytes_each: of one stored number.
    """
    positions = sum(min(context_tokens, window or context_tokens) for window in decoder.layer_windows)
    return round(2 * positions * decoder.num_kv_heads * decoder.head_dim * bytes_each)
