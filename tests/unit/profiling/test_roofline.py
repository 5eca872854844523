from hasten.profiling.roofline import achieved_bytes_per_s, max_tokens_per_s


def test_the_limit_is_bandwidth_over_weights() -> None:
    # Llama-3.1-8B in bf16 on a machine that reads 4.27 TB/s: at most 285 tokens a second
    assert round(max_tokens_per_s(15_000_000_000, 4.27e12)) == 285
    assert round(achieved_bytes_per_s(1_000_000, 0.001)) == 1_000_000_000
