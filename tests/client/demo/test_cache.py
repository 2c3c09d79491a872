"""The device cache: what a hash covers, what a key looks like, which block goes first."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from kvtier_client.demo.cache import (
    NULL_BLOCK,
    ROOT_HASH,
    BlockHash,
    BlockPool,
    DeviceCache,
    GroupSpec,
    block_hashes,
    offload_key,
)

FULL = GroupSpec((0,))
WINDOW = GroupSpec((1,), window=6)


def make_cache(*groups: GroupSpec, num_blocks: int = 8) -> DeviceCache:
    return DeviceCache(groups, num_blocks, tokens_per_block=4, kv_heads=1, head_dim=2)


def to_hashes(count: int, prompt: int = 0) -> list[BlockHash]:
    return block_hashes([prompt] * 4 * count, 4)


def run_prompt(cache: DeviceCache, hashes: list[BlockHash]) -> list[list[int]]:
    """Do to the cache what a request does that computes all its blocks and finishes."""
    tables = cache.start_tables(hashes, 0, 0, len(hashes))
    assert tables is not None
    cache.publish(tables, hashes, 0, len(hashes))
    cache.release(tables)
    return tables


def test_only_full_blocks_have_a_hash() -> None:
    assert [len(block_hashes(range(n), 4)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_a_hash_covers_its_parent_and_its_tokens() -> None:
    first, second = block_hashes([1, 2, 3, 260, 5, 6, 7, 8], 4)
    tokens = b"".join(token.to_bytes(4, "little") for token in (1, 2, 3, 260))
    assert first == hashlib.sha256(ROOT_HASH + tokens).digest()
    changed_head = block_hashes([9, 2, 3, 260, 5, 6, 7, 8], 4)
    changed_tail = block_hashes([1, 2, 3, 260, 5, 6, 7, 9], 4)
    assert changed_head[1] != second
    assert changed_tail[0] == first
    assert changed_tail[1] != second


def test_a_key_is_the_hash_and_the_group_as_four_bytes_big_endian() -> None:
    (block_hash,) = block_hashes([1, 2, 3, 4], 4)
    assert offload_key(block_hash, 258) == block_hash + b"\x00\x00\x01\x02"
    assert len(offload_key(block_hash, 0)) == 36


def test_a_window_reaches_back_as_many_tokens_as_it_is_wide_the_own_one_included() -> None:
    assert [WINDOW.first_block(position, 4) for position in (0, 5, 8, 9, 12, 13)] == [0, 0, 0, 1, 1, 2]
    assert FULL.first_block(1000, 4) == 0


def test_pages_share_memory_with_what_attention_reads() -> None:
    cache = make_cache(GroupSpec((0, 2)), GroupSpec((1,), window=6))
    pages = cache.pages(0)
    assert [array.shape for array in pages] == [(8, cache.page_bytes)] * 2
    assert all(array.dtype == np.uint8 and array.flags.c_contiguous for array in pages)
    cache.write(2, 5, 1, torch.full((2, 1, 2), 3.0), torch.full((2, 1, 2), 4.0))
    floats = pages[1][5].view(np.float32).reshape(2, 4, 2)
    assert floats[0, 1:3].min() == floats[0].max() == 3.0
    assert floats[1, 1:3].min() == floats[1].max() == 4.0
    pages[1][6] = pages[1][5]
    keys, values = cache.read(2, torch.tensor([6]))
    assert keys[1:3].eq(3.0).all()
    assert values[1:3].eq(4.0).all()
    assert not pages[0].any()


def test_released_prefixes_are_found_again() -> None:
    cache = make_cache(FULL)
    hashes = to_hashes(3)
    tables = run_prompt(cache, hashes)
    assert cache.match_prefix(hashes) == 3
    again = cache.start_tables(hashes, 2, 2, 3)
    assert again is not None
    assert again[0][:2] == tables[0][:2]
    assert again[0][2] != tables[0][2]
    cache.pools[0].check_integrity()


def test_the_longest_unused_prefix_is_evicted_tail_first() -> None:
    cache = make_cache(FULL, num_blocks=8)
    old, new = to_hashes(3, prompt=1), to_hashes(3, prompt=2)
    run_prompt(cache, old)
    run_prompt(cache, new)
    cache.start_tables([], 0, 0, 1)  # the one block never used
    cache.start_tables([], 0, 0, 1)
    assert (cache.match_prefix(old), cache.match_prefix(new)) == (2, 3)
    cache.start_tables([], 0, 0, 3)
    assert (cache.match_prefix(old), cache.match_prefix(new)) == (0, 2)
    cache.pools[0].check_integrity()


def test_referenced_blocks_are_never_evicted_and_a_start_that_does_not_fit_changes_nothing() -> None:
    cache = make_cache(FULL, WINDOW, num_blocks=8)
    hashes = to_hashes(4)
    run_prompt(cache, hashes)
    held = cache.start_tables(hashes, 4, 4, 6)
    assert held is not None
    before = [pool.references() for pool in cache.pools]
    assert cache.start_tables(to_hashes(3, prompt=1), 0, 0, 3) is None
    assert cache.start_tables(hashes, 4, 4, 6) is None
    assert [pool.references() for pool in cache.pools] == before
    assert cache.match_prefix(hashes) == 4
    for pool in cache.pools:
        pool.check_integrity()


def test_a_window_group_matches_with_the_blocks_of_the_window_only() -> None:
    cache = make_cache(FULL, WINDOW, num_blocks=12)
    hashes = to_hashes(6)
    tables = cache.start_tables(hashes, 0, 0, 6)
    assert tables is not None
    cache.publish([tables[0], [NULL_BLOCK] * 6], hashes, 0, 6)
    assert cache.match_prefix(hashes) == 0
    cache.publish([[NULL_BLOCK] * 6, [*[NULL_BLOCK] * 3, *tables[1][3:5], NULL_BLOCK]], hashes, 0, 6)
    # At 5 blocks the next token (20) sees from 15 on: blocks 3 and 4.
    assert cache.match_prefix(hashes) == 5
    shared = cache.start_tables(hashes, 5, 5, 6)
    assert shared is not None
    assert shared[0][:5] == tables[0][:5]
    assert shared[1][:5] == [NULL_BLOCK, NULL_BLOCK, NULL_BLOCK, *tables[1][3:5]]


def test_blocks_leave_the_window_once_and_stay_findable() -> None:
    cache = make_cache(FULL, WINDOW)
    hashes = to_hashes(4)
    tables = cache.start_tables(hashes, 0, 0, 4)
    assert tables is not None
    cache.publish(tables, hashes, 0, 4)
    free = cache.pools[1].num_free
    for position in (8, 9, 13, 13):
        cache.release_out_of_window(tables, position)
    assert tables[1][:2] == [NULL_BLOCK, NULL_BLOCK]
    assert NULL_BLOCK not in tables[1][2:] + tables[0]
    assert cache.pools[1].num_free == free + 2
    assert cache.pools[1].find(hashes[0]) is not None
    cache.release(tables)
    for pool in cache.pools:
        pool.check_integrity()


def test_of_two_equal_blocks_the_second_is_not_published() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    (block_hash,) = to_hashes(1)
    pool.publish(first, block_hash)
    pool.publish(second, block_hash)
    assert pool.find(block_hash) == first
    pool.release(second)
    assert pool.allocate(1) == [second], "a block without a hash goes before the others"
    pool.check_integrity()
