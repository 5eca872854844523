"""The paged KV cache: storage for keys and values in blocks of a fixed number of tokens.

Which block belongs to which sequence is decided by `engine.block_manager`; here is only the
memory and how a step writes to it (Kwon et al., "Efficient Memory Management for Large
Language Model Serving with PagedAttention", arXiv 2309.06180, section 4).
"""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers.

    Args:
        keys, values: one tensor a layer, [num_blocks, block_size, num_kv_heads, head_dim].

    Attributes:
        key_rows, value_rows: the same memory by slot, [num_blocks * block_size, num_kv_heads, head_dim].
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    key_rows: tuple[torch.Tensor, ...] = field(init=False)
    value_rows: tuple[torch.Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key_rows", tuple(each.flatten(0, 1) for each in self.keys))
        object.__setattr__(self, "value_rows", tuple(each.flatten(0, 1) for each in self.values))

    @property
    def num_blocks(self) -> int:
        return self.keys[0].shape[0]

    @property
    def block_size(self) -> int:
        return self.keys[0].shape[1]


def allocate_kv_cache(
    num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: str
) -> KVCache:
    """A cache of uninitialized memory; a slot is read only after a step has written it.

    A GPU's lies in memory as its shape says, a slot's heads together; on a CPU a head's slots are together, because
    there a core reads one head after the other, and neighbours are fetched ahead.
    """
    if device == "cpu":
        shape = (num_kv_heads, num_blocks, block_size, head_dim)
        tensors = [torch.empty(shape, dtype=dtype).permute(1, 2, 0, 3) for _ in range(2 * num_layers)]
    else:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        tensors = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2 * num_layers)]
    return KVCache(tuple(tensors[:num_layers]), tuple(tensors[num_layers:]))
