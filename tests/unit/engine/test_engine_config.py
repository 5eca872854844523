"""How the engine's limits follow from the model and the memory, and what is refused."""

import pytest

from hasten.engine.config import EngineConfig, decode_buckets, resolve
from hasten.errors import ResourceError, UsageError

MIB = 2**20
TOKEN_BYTES = MIB // 16  # a block of 16 tokens is 1 MiB


def test_cache_holds_every_sequence_at_its_longest() -> None:
    resolved = resolve(EngineConfig(max_num_seqs=4, max_model_tokens=100), 2048, TOKEN_BYTES, 1000 * MIB)
    assert resolved.num_blocks == 4 * 7


def test_cache_takes_at_most_half_of_the_free_memory(caplog: pytest.LogCaptureFixture) -> None:
    resolved = resolve(EngineConfig(max_num_seqs=8, max_model_tokens=160), 2048, TOKEN_BYTES, 100 * MIB)
    assert resolved.num_blocks == 50
    assert "room for 5 of 8 sequences of 160 tokens" in caplog.text


def test_model_context_bounds_a_sequence() -> None:
    assert resolve(EngineConfig(max_model_tokens=4096), 512, TOKEN_BYTES, 10**12).max_model_tokens == 512


def test_too_little_memory_says_which_limit_to_lower_to_what() -> None:
    config = EngineConfig(max_model_tokens=1600)
    message = "1600 tokens needs 100 MiB and 50% of the free memory is 50 MiB: lower max_model_tokens to 800"
    with pytest.raises(ResourceError, match=message):
        resolve(config, 2048, TOKEN_BYTES, 100 * MIB)
    lowered = EngineConfig(max_model_tokens=800)
    assert resolve(lowered, 2048, TOKEN_BYTES, 100 * MIB).num_blocks == 50


def test_num_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ResourceError, match="200 MiB and 100 MiB are free: lower num_blocks to 100"):
        resolve(EngineConfig(num_blocks=200), 2048, TOKEN_BYTES, 100 * MIB)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_model_tokens", "max_num_batched_tokens", "block_size"])
def test_limits_below_one_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} must be at least 1, got 0"):
        EngineConfig(**{name: 0})


def test_budget_must_feed_every_running_sequence() -> None:
    with pytest.raises(UsageError, match=r"at least max_num_seqs \(16\)"):
        EngineConfig(max_num_seqs=16, max_num_batched_tokens=8)


def test_decode_buckets() -> None:
    assert decode_buckets(8) == (1, 2, 4, 8)
    assert decode_buckets(256) == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert decode_buckets(6) == (1, 2, 4, 6)
    assert decode_buckets(1) == (1,)
