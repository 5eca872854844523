"""Which block of the KV cache belongs to whom: reference counts, prefix reuse, eviction.

The invariant: a block is either held (reference count above 0) or free, never both, never
neither. A free block may still hold a known prefix; it is reused when a prompt starts with
that prefix, and given away, least recently used first, when memory is needed.

A full block is known by a hash chain: SHA-256 of the hash of all blocks before it and of its
own tokens. A match is accepted only if parent hash and tokens are equal, so a collision costs
a miss and never a wrong token. Sequences that share a prefix share its full blocks; a block
that is still being written belongs to one sequence, so nothing is ever copied.

A sequence gets consecutive blocks where that is possible, because its keys and values are
then one slice of the cache: when it starts, a run of free blocks as long as it may become is
set aside for it. Others take from that run only when nothing else is free. A sequence that shares a
known prefix goes on right behind it only where no other known prefix is lost by that.

Not here: the memory itself (`kernels.kv_cache`), and what to do without a free block
(`scheduler` preempts). After Kwon et al., arXiv 2309.06180, sections 4.2 to 4.4.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hasten.errors import OutOfBlocksError

NOT_FREE = np.iinfo(np.int64).max


def chain_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a full block, given the hash of all blocks before it (b"" for the first)."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """What a full, computed block holds."""

    digest: bytes
    parent: bytes
    token_ids: tuple[int, ...]


@dataclass(eq=False, slots=True)
class BlockTable:
    """The blocks that one sequence holds, in the order of its tokens.

    Args:
        next_reserved, reserved_end: what is left of the run set aside for it.
    """

    block_ids: list[int] = field(default_factory=list)
    next_reserved: int = 0
    reserved_end: int = 0


class BlockManager:
    """Hands out the blocks 0 to num_blocks - 1.

    Args:
        consecutive: whether to set runs of blocks aside.
    """

    def __init__(self, num_blocks: int, block_size: int, consecutive: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._consecutive = consecutive
        self._ref_counts = [0] * num_blocks
        self._contents: dict[int, CachedBlock] = {}
        self._by_digest: dict[bytes, int] = {}
        # In the order in which they are given away: without contents first, then by last use.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        # When a free block's contents were last used; 0 for one that holds nothing known, NOT_FREE for others.
        self._last_use = np.zeros(num_blocks, np.int64)
        self._clock = 0
        # Free too, but set aside for a sequence that may grow into them.
        self._reserved: dict[int, None] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free) + len(self._reserved)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find(self, content: CachedBlock) -> int | None:
        """The block that holds these tokens after this prefix, None if there is none."""
        block = self._by_digest.get(content.digest)
        return block if block is not None and self._contents[block] == content else None

    def share(self, table: BlockTable, block: int) -> None:
        """Appends a block that `find` returned, held together with whoever holds it."""
        if self._ref_counts[block] == 0:
            self._free.pop(block, None)
            self._reserved.pop(block, None)
            self._last_use[block] = NOT_FREE
        self._ref_counts[block] += 1
        table.block_ids.append(block)

    def grow(self, table: BlockTable, num_tokens: int, max_tokens: int) -> None:
        """Appends blocks until the table holds `num_tokens`; none if it does already.

        Args:
            max_tokens: the most tokens that the sequence may come to hold; sets blocks aside.

        Raises:
            OutOfBlocksError: too few are free; the table is as it was and the caller preempts.
        """
        missing = self.num_blocks_for(num_tokens) - len(table.block_ids)
        if missing <= 0:
            return
        if missing > self.num_free_blocks:
            raise OutOfBlocksError(f"{missing} KV cache blocks are needed and {self.num_free_blocks} are free")
        if self._consecutive and table.reserved_end == 0:
            self._reserve(table, self.num_blocks_for(max_tokens) - len(table.block_ids))
        for _ in range(missing):
            block = self._take(table)
            self._forget(block)
            self._ref_counts[block] = 1
            table.block_ids.append(block)

    def record(self, block: int, content: CachedBlock) -> None:
        """Makes a held block that is full and computed known to `find`.

        If another block has the same content that one stays known, and this one is private.
        """
        if content.digest not in self._by_digest:
            self._by_digest[content.digest] = block
            self._contents[block] = content

    def forget(self, table: BlockTable) -> None:
        """Makes the contents of a table's blocks unknown; they stay held."""
        for block in table.block_ids:
            self._forget(block)

    def release(self, table: BlockTable) -> None:
        """Gives back all blocks of a table and leaves it empty."""
        # Last block first: a prefix outlives what continues it, because it is of more use.
        for block in reversed(table.block_ids):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._add_free(block)
        for block in range(table.next_reserved, table.reserved_end):
            if block in self._reserved:
                del self._reserved[block]
                self._add_free(block)
        table.block_ids.clear()
        table.next_reserved = table.reserved_end = 0

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Fails if a block has leaked, or was freed while held.

        Args:
            tables: every table that holds blocks.

        Raises:
            AssertionError: what is wrong with which block.
        """
        held = Counter(block for table in tables for block in table.block_ids)
        for block, ref_count in enumerate(self._ref_counts):
            assert ref_count == held[block], f"block {block}: count {ref_count}, held {held[block]} times"
            num_free = (block in self._free) + (block in self._reserved)
            assert num_free == (ref_count == 0), f"block {block}: count {ref_count}, {num_free} times free"
            is_free = self._last_use[block] != NOT_FREE
            assert is_free == (block in self._free), f"block {block}: last use {self._last_use[block]}"
        for digest, block in self._by_digest.items():
            assert self._contents[block].digest == digest, f"block {block} is known by another block's hash"
        assert len(self._contents) == len(self._by_digest), "a block's contents are known by no hash"

    def _take(self, table: BlockTable) -> int:
        """Removes one block from the free ones: the next of the table's run if it is there."""
        block = self._next_free(table)
        self._last_use[block] = NOT_FREE
        return block

    def _next_free(self, table: BlockTable) -> int:
        if table.next_reserved < table.reserved_end:
            block = table.next_reserved
            table.next_reserved += 1
            for pool in (self._reserved, self._free):
                if block in pool:
                    del pool[block]
                    return block
        if self._free:
            return self._free.popitem(last=False)[0]
        return self._reserved.popitem()[0]

    def _forget(self, block: int) -> None:
        content = self._contents.pop(block, None)
        if content is not None:
            del self._by_digest[content.digest]

    def _add_free(self, block: int) -> None:
        self._free[block] = None
        self._clock += 1
        self._last_use[block] = self._clock
        if block not in self._contents:
            self._last_use[block] = 0
            self._free.move_to_end(block, last=False)

    def _reserve(self, table: BlockTable, length: int) -> None:
        """Sets free blocks aside: those that continue the table if they hold nothing known, else the cheapest run."""
        start = table.block_ids[-1] + 1 if table.block_ids else None
        if start is None or not all(self._is_blank(block) for block in range(start, start + length)):
            start = self._cheapest_run(length)
        if start is None:
            return
        table.next_reserved, table.reserved_end = start, start + length
        for block in range(start, start + length):
            del self._free[block]
            self._reserved[block] = None
        self._last_use[start : start + length] = NOT_FREE

    def _is_blank(self, block: int) -> bool:
        return block in self._free and block not in self._contents

    def _cheapest_run(self, length: int) -> int | None:
        """Start of the free run whose contents were last used longest ago; None if no run is that long."""
        if length > self.num_blocks:
            return None
        newest = window_maximum(self._last_use, length)
        start = int(newest.argmin())
        return start if newest[start] < NOT_FREE else None


def window_maximum(values: np.ndarray, length: int) -> np.ndarray:
    """The greatest of each `length` consecutive values [n]: [n - length + 1], in time that does not depend on length.

    After van Herk, "A fast algorithm for local minimum and maximum filters", 1992.
    """
    num_windows = len(values) - length + 1
    padded = np.pad(values, (0, -len(values) % length), mode="edge").reshape(-1, length)
    from_begin = np.maximum.accumulate(padded, axis=1).ravel()
    to_end = np.maximum.accumulate(padded[:, ::-1], axis=1)[:, ::-1].ravel()
    return np.maximum(to_end[:num_windows], from_begin[length - 1 : length - 1 + num_windows])
