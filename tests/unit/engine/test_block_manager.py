"""The block manager under random use, and the properties that a random walk would not name."""

import dataclasses
import random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hasten.engine.block_manager import BlockManager, BlockTable, CachedBlock, chain_digest, window_maximum
from hasten.errors import OutOfBlocksError

BLOCK_SIZE = 2
NUM_BLOCKS = 8


def contents_of(token_ids: list[int]) -> list[CachedBlock]:
    contents: list[CachedBlock] = []
    for start in range(0, len(token_ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
        tokens = tuple(token_ids[start : start + BLOCK_SIZE])
        parent = contents[-1].digest if contents else b""
        contents.append(CachedBlock(chain_digest(parent, tokens), parent, tokens))
    return contents


def fill(manager: BlockManager, token_ids: list[int]) -> BlockTable:
    """A table that holds these tokens, all of its full blocks known."""
    table = BlockTable()
    manager.grow(table, len(token_ids), len(token_ids))
    for block, content in zip(table.block_ids, contents_of(token_ids), strict=False):
        manager.record(block, content)
    return table


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences over an alphabet of two tokens, so that prefixes often agree.

    `memory` is what the cache would hold: what a block was last written with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.tables: list[tuple[BlockTable, list[int]]] = []
        self.memory: dict[int, tuple[int, ...]] = {}

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=10), growth=st.integers(0, 6))
    def start(self, token_ids: list[int], growth: int) -> None:
        table = BlockTable()
        contents = contents_of(token_ids)
        for index, content in enumerate(contents):
            block = self.manager.find(content)
            if block is None:
                break
            assert self.memory[block] == content.token_ids, "a hit must hold the tokens that it is known by"
            assert index == 0 or content.parent == contents[index - 1].digest
            self.manager.share(table, block)
        num_shared = len(table.block_ids)
        try:
            self.manager.grow(table, len(token_ids), len(token_ids) + growth)
        except OutOfBlocksError:
            assert len(table.block_ids) == num_shared
            self.manager.release(table)
            return
        self.tables.append((table, token_ids))
        self.write(table, token_ids, num_shared)

    @rule(data=st.data(), token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def extend(self, data: st.DataObject, token_ids: list[int]) -> None:
        if not self.tables:
            return
        table, known = data.draw(st.sampled_from(self.tables))
        before = list(table.block_ids)
        try:
            self.manager.grow(table, len(known) + len(token_ids), len(known) + len(token_ids))
        except OutOfBlocksError:
            assert table.block_ids == before
            return
        assert table.block_ids[: len(before)] == before
        first_block = len(known) // BLOCK_SIZE
        known += token_ids
        self.write(table, known, first_block)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if not self.tables:
            return
        index = data.draw(st.integers(0, len(self.tables) - 1))
        table, _ = self.tables.pop(index)
        self.manager.release(table)
        assert table.block_ids == []

    def write(self, table: BlockTable, token_ids: list[int], first_block: int) -> None:
        for index in range(first_block, len(table.block_ids)):
            self.memory[table.block_ids[index]] = tuple(token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
        for index, content in enumerate(contents_of(token_ids)):
            if index >= first_block:
                self.manager.record(table.block_ids[index], content)

    @invariant()
    def is_whole(self) -> None:
        self.manager.check_integrity(table for table, _ in self.tables)

    @invariant()
    def every_table_still_holds_its_tokens(self) -> None:
        for table, token_ids in self.tables:
            for index, block in enumerate(table.block_ids):
                assert self.memory[block] == tuple(token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])

    def teardown(self) -> None:
        for table, _ in self.tables:
            self.manager.release(table)
        self.manager.check_integrity(())
        assert self.manager.num_free_blocks == NUM_BLOCKS


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


def test_growing_together_gives_each_table_consecutive_blocks() -> None:
    manager = BlockManager(16, BLOCK_SIZE)
    tables = [BlockTable() for _ in range(2)]
    for num_tokens in range(1, 17):
        for table in tables:
            manager.grow(table, num_tokens, 16)
    assert [table.block_ids for table in tables] == [list(range(8)), list(range(8, 16))]


def test_blocks_interleave_without_consecutive() -> None:
    manager = BlockManager(16, BLOCK_SIZE, consecutive=False)
    tables = [BlockTable() for _ in range(2)]
    for num_tokens in range(1, 17):
        for table in tables:
            manager.grow(table, num_tokens, 16)
    assert tables[0].block_ids == list(range(0, 16, 2))


def test_reserved_blocks_are_given_away_when_no_other_is_free() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    first, second = BlockTable(), BlockTable()
    manager.grow(first, 2, 16)  # reserves everything
    manager.grow(second, 14, 14)
    assert manager.num_free_blocks == 0
    with pytest.raises(OutOfBlocksError, match="1 KV cache blocks are needed and 0 are free"):
        manager.grow(first, 3, 16)
    manager.release(second)
    manager.grow(first, 16, 16)
    manager.check_integrity((first,))


def test_least_recently_used_prefix_is_evicted_first() -> None:
    manager = BlockManager(3, BLOCK_SIZE)
    streams = [[0, 0], [1, 1], [2, 2]]
    for stream in streams:
        manager.release(fill(manager, stream))
    again = BlockTable()
    block = manager.find(contents_of(streams[0])[0])
    assert block is not None
    manager.share(again, block)
    manager.release(again)  # now [1, 1] was used longest ago
    manager.grow(BlockTable(), 2, 2)
    assert [manager.find(contents_of(stream)[0]) is not None for stream in streams] == [True, False, True]


def test_beginning_of_a_prefix_outlives_its_end() -> None:
    manager = BlockManager(3, BLOCK_SIZE)
    stream = [0, 0, 1, 1, 2, 2]
    manager.release(fill(manager, stream))
    manager.grow(BlockTable(), 2, 2)
    assert [manager.find(content) is not None for content in contents_of(stream)] == [True, True, False]


def test_unknown_blocks_are_taken_before_known_ones() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    manager.release(fill(manager, [0, 0, 1, 1]))
    manager.grow(BlockTable(), 4, 4)
    assert all(manager.find(content) is not None for content in contents_of([0, 0, 1, 1]))


def test_what_continues_a_shared_prefix_evicts_no_other_while_there_is_room() -> None:
    """A regression test: three prompts in turns had each other's first block, and were never found again."""
    manager = BlockManager(32, BLOCK_SIZE)
    streams = [[kind] * 7 for kind in range(3)]  # three full blocks, and one that is not
    for _ in range(3):
        for stream in streams:
            table = BlockTable()
            for content in contents_of(stream):
                if (block := manager.find(content)) is None:
                    break
                manager.share(table, block)
            num_shared = len(table.block_ids)
            manager.grow(table, len(stream), len(stream) + 2)
            for block, content in zip(table.block_ids, contents_of(stream), strict=False):
                manager.record(block, content)
            manager.release(table)
            manager.check_integrity(())
        assert all(manager.find(content) is not None for stream in streams for content in contents_of(stream))
    assert num_shared == 3


@settings(max_examples=300)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 40))
def test_window_maximum_is_that_of_each_window(values: list[int], length: int) -> None:
    length = min(length, len(values))
    expected = [max(values[start : start + length]) for start in range(len(values) - length + 1)]
    assert window_maximum(np.array(values), length).tolist() == expected


@pytest.mark.parametrize("seed", range(20))
def test_a_sequence_gets_the_run_that_was_used_longest_ago(seed: int) -> None:
    draw = random.Random(seed)
    manager = BlockManager(32, BLOCK_SIZE)
    tables: list[BlockTable] = []
    for number in range(60):
        while tables and (draw.random() < 0.4 or manager.num_free_blocks < 8):
            manager.release(tables.pop(draw.randrange(len(tables))))
        length = draw.randint(1, 8)
        newest_of_runs = {
            start: max(manager._last_use[block] for block in range(start, start + length))
            for start in range(manager.num_blocks - length + 1)
            if all(block in manager._free for block in range(start, start + length))
        }
        table = fill(manager, [number] * BLOCK_SIZE * length)
        if newest_of_runs:
            assert table.block_ids[0] == min(newest_of_runs, key=lambda start: (newest_of_runs[start], start))
            assert table.block_ids == list(range(table.block_ids[0], table.block_ids[0] + length))
        tables.append(table)
        manager.check_integrity(tables)


def test_hash_collision_is_a_miss() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    fill(manager, [0, 0])
    known = contents_of([0, 0])[0]
    assert manager.find(known) is not None
    assert manager.find(dataclasses.replace(known, token_ids=(1, 1))) is None
    assert manager.find(dataclasses.replace(known, parent=b"another")) is None


def test_same_tokens_after_another_prefix_are_another_block() -> None:
    first, second = contents_of([0, 0, 1, 1])[1], contents_of([2, 2, 1, 1])[1]
    assert first.token_ids == second.token_ids
    assert first.digest != second.digest


def test_second_block_with_known_contents_stays_private() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    first, second = fill(manager, [0, 0]), fill(manager, [0, 0])
    assert manager.find(contents_of([0, 0])[0]) == first.block_ids[0]
    manager.check_integrity((first, second))


def test_check_integrity_sees_a_leak() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    fill(manager, [0, 0])
    with pytest.raises(AssertionError, match="block 0: count 1, held 0 times"):
        manager.check_integrity(())
