"""The limit that memory sets to decoding.

A decode step at batch 1 reads every weight once, and little else:

    step_s >= weight bytes a token / read bandwidth
    tokens a second <= read bandwidth / weight bytes a token

The KV cache is not counted; it adds to the bytes as the context grows. A model that fits the
processor's caches can be faster than its memory allows, and its share of the limit then passes 1.
(Williams et al., "Roofline: An Insightful Visual Performance Model", CACM 52(4), 2009.)
"""


def max_tokens_per_s(weight_bytes_per_token: int, bandwidth_bytes_per_s: float) -> float:
    """Most tokens a second of one request on this machine."""
    return bandwidth_bytes_per_s / weight_bytes_per_token


def achieved_bytes_per_s(weight_bytes_per_token: int, step_s: float) -> float:
    """Rate at which a step that takes step_s reads the weights."""
    return weight_bytes_per_token / step_s
