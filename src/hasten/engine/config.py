"""How the native engine runs: its limits, and how they follow from the model and the memory.

Building a config is pure. `resolve` fills in what was left open, and refuses what cannot fit
before anything is allocated.
"""

import dataclasses
import logging
from dataclasses import dataclass

from hasten.errors import ResourceError, UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineConfig:
    """Limits of the native engine.

    Args:
        max_num_seqs: most sequences that run at the same time; the others wait.
        max_model_tokens: most tokens of one sequence, prompt and output together.
        max_num_batched_tokens: most tokens that one step computes: longer prompts are
            prefilled in chunks of this size, shared with the sequences that decode.
        block_size: tokens of one KV cache block.
        num_blocks: size of the KV cache; None is as many blocks as max_num_seqs sequences of
            max_model_tokens need, or as fit in the memory that the cache may take.
        enable_prefix_cache: whether a prompt reuses blocks of earlier requests.
        consecutive_blocks: whether a sequence is given blocks that lie one after the other.
    """

    max_num_seqs: int = 8
    max_model_tokens: int = 2048
    max_num_batched_tokens: int = 512
    block_size: int = 16
    num_blocks: int | None = None
    enable_prefix_cache: bool = True
    consecutive_blocks: bool = True

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_model_tokens", "max_num_batched_tokens", "block_size", "num_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens must be at least max_num_seqs ({self.max_num_seqs}), so that every running "
                f"sequence gets its token in every step, got {self.max_num_batched_tokens}"
            )


def resolve(
    config: EngineConfig, max_context_tokens: int, kv_bytes_per_token: int, available_bytes: int, share: float = 0.5
) -> EngineConfig:
    """The config with every open value filled in.

    Args:
        max_context_tokens: the model's.
        kv_bytes_per_token: keys and values of one token in all layers.
        available_bytes: free memory of the device, weights already loaded.
        share: of the free memory, what the cache may take where num_blocks is open.

    Raises:
        ResourceError: the cache does not fit; says which limit to lower to what.
    """
    if config.max_model_tokens > max_context_tokens:
        logger.info("max_model_tokens is %d: the model's context ends there", max_context_tokens)
        config = dataclasses.replace(config, max_model_tokens=max_context_tokens)
    block_bytes = config.block_size * kv_bytes_per_token
    if config.num_blocks is not None:
        if config.num_blocks * block_bytes > available_bytes:
            raise ResourceError(
                f"a KV cache of {config.num_blocks} blocks needs {_mib(config.num_blocks * block_bytes)} and "
                f"{_mib(available_bytes)} are free: lower num_blocks to {available_bytes // block_bytes}"
            )
        return config
    blocks_per_seq = -(-config.max_model_tokens // config.block_size)
    wanted = config.max_num_seqs * blocks_per_seq
    cache_bytes = int(available_bytes * share)
    num_blocks = min(wanted, cache_bytes // block_bytes)
    if num_blocks < blocks_per_seq:
        cure = f"lower max_model_tokens to {num_blocks * config.block_size}" if num_blocks else "free some memory"
        raise ResourceError(
            f"the KV cache of one sequence of {config.max_model_tokens} tokens needs "
            f"{_mib(blocks_per_seq * block_bytes)} and {share:.0%} of the free memory is {_mib(cache_bytes)}: "
            f"{cure}"
        )
    if num_blocks < wanted:
        logger.warning(
            "the KV cache has room for %d of %d sequences of %d tokens: %.0f%% of the free memory is %s",
            num_blocks // blocks_per_seq,
            config.max_num_seqs,
            config.max_model_tokens,
            share * 100,
            _mib(cache_bytes),
        )
    return dataclasses.replace(config, num_blocks=num_blocks)


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes of captured decode steps: powers of two, and the largest batch."""
    powers = [1 << exponent for exponent in range(max_num_seqs.bit_length())]
    return (*powers, *([] if powers[-1] == max_num_seqs else [max_num_seqs]))


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
