"""What a GPU reads of a step with prompts: one array of int32, so that one copy brings it there."""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.engine.scheduler import ScheduledChunk
from hasten.kernels.cuda.ragged_attention import TILE_FIELDS, attention_tiles


@dataclass(frozen=True)
class TokenLayout:
    """Where things lie in the array."""

    num_tokens: int
    num_tiles: int
    num_wanted: int

    @property
    def size(self) -> int:
        return 3 * self.num_tokens + TILE_FIELDS * self.num_tiles + self.num_wanted

    def split(self, array: Any) -> tuple[Any, Any, Any, Any, Any]:
        """The parts of such an array, of numpy or torch.

        Returns:
            token ids, positions, slots [num_tokens]; tiles [num_tiles, TILE_FIELDS]; the tokens whose logits are
            wanted [num_wanted].
        """
        num_ints, size = 3 * self.num_tokens, self.size - self.num_wanted
        tiles = array[num_ints:size].reshape(self.num_tiles, TILE_FIELDS)
        return *array[:num_ints].reshape(3, self.num_tokens), tiles, array[size:]


def chunk_tiles(chunks: Items[ScheduledChunk], first: int, group: int) -> np.ndarray:
    """The tiles of chunks whose tokens lie behind one another from the step's first-th on.

    Args:
        group: query heads of a key head.
    """
    counts = [chunk.num_tokens for chunk in chunks]
    starts = first + np.cumsum([0, *counts[:-1]])
    slots = np.array([chunk.sequence.slot for chunk in chunks])
    return attention_tiles(starts, np.array(counts), slots, np.array([chunk.start for chunk in chunks]), group)


def step_array(chunks: Items[ScheduledChunk], tiles: np.ndarray, layout: TokenLayout, block_size: int) -> np.ndarray:
    """The step's tokens, one chunk behind the other; those that fill up the layout have slot -1.

    A decode's token id is left out: it may only be known on the GPU.
    """
    array = np.zeros(layout.size, dtype=np.int32)
    token_ids, positions, slots, its_tiles, wanted = layout.split(array)
    slots[:] = -1
    start, ends = 0, []
    for chunk in chunks:
        sequence, end = chunk.sequence, start + chunk.num_tokens
        where = np.arange(chunk.start, chunk.start + chunk.num_tokens)
        blocks = np.array(sequence.table.block_ids, dtype=np.int32)
        positions[start:end] = where
        slots[start:end] = blocks[where // block_size] * block_size + where % block_size
        if not chunk.is_decode:
            token_ids[start:end] = sequence.token_ids[chunk.start : chunk.start + chunk.num_tokens]
        if chunk.samples:
            ends.append(end)
        start = end
    its_tiles[: len(tiles)] = tiles
    wanted[: len(ends)] = np.array(ends, dtype=np.int32) - 1
    return array
