"""Groups of layers with a sliding window: blocks behind it become the null block."""

import pytest

from octavo_kvcache import (
    UNCHANGED,
    Allocation,
    BlockCopy,
    CacheFull,
    CacheManager,
    InvalidArgument,
    KVCacheSpec,
    TableUpdate,
)

FULL = KVCacheSpec(1, 8)
WINDOW = KVCacheSpec(1, 8, kind="window", window=6)


def run(cache: CacheManager, seq_id: str, tokens: list[int], start: int, stop: int) -> Allocation:
    allocation = cache.allocate(seq_id, start, stop - start)
    cache.commit(seq_id, tokens, stop)
    return allocation


def test_blocks_behind_the_window_become_null_and_are_reused():
    cache = CacheManager(num_blocks=10, block_size=4, groups=[WINDOW])
    tokens = list(range(100))
    cache.add("a")
    assert run(cache, "a", tokens, 0, 12).updates == (TableUpdate(0, (1, 2, 3)),)
    # the query at 12 sees 7 to 12: block 0 is behind
    assert run(cache, "a", tokens, 12, 16).updates == (TableUpdate(0, (0, 2, 3, 4)),)
    assert run(cache, "a", tokens, 16, 20).updates == (TableUpdate(1, (0, 3, 4, 5)),)
    assert cache.block_ids("a") == ([0, 0, 3, 4, 5],)
    assert cache.stats().num_used == 3


def test_window_moves_with_committed_tokens_only():
    cache = CacheManager(num_blocks=10, block_size=4, groups=[WINDOW])
    cache.add("a")
    cache.allocate("a", 0, 12)
    assert cache.allocate("a", 12, 4).updates == (TableUpdate(3, (4,)),)  # the first step may still be taken back
    cache.commit("a", list(range(12)), 12)
    assert cache.allocate("a", 16, 1).updates == (TableUpdate(0, (0, 2, 3, 4, 5)),)


def test_full_cache_counts_what_the_window_gives_back():
    cache = CacheManager(num_blocks=4, block_size=4, groups=[WINDOW])
    tokens = list(range(100))
    cache.add("a")
    run(cache, "a", tokens, 0, 12)
    before = cache.stats()
    assert not cache.can_allocate("a", 12, 5)
    with pytest.raises(CacheFull) as caught:
        cache.allocate("a", 12, 5)
    assert (caught.value.wanted, caught.value.free) == (1, 0)
    assert (cache.stats(), cache.block_ids("a")) == (before, ([1, 2, 3],))
    assert cache.allocate("a", 12, 4).updates[0].block_ids[0] == 0


def test_groups_have_their_own_blocks_of_one_pool():
    cache = CacheManager(num_blocks=20, block_size=4, groups=[FULL, WINDOW])
    tokens = list(range(100))
    cache.add("a")
    assert run(cache, "a", tokens, 0, 9).updates == (TableUpdate(0, (1, 2, 3)), TableUpdate(0, (4, 5, 6)))
    assert run(cache, "a", tokens, 9, 12) is UNCHANGED
    updates = run(cache, "a", tokens, 12, 13).updates
    assert updates == (TableUpdate(3, (7,)), TableUpdate(0, (0, 5, 6, 8)))
    assert cache.block_ids("a") == ([1, 2, 3, 7], [0, 5, 6, 8])
    assert cache.stats().num_cached == 1  # block 4 is free, but can still be hit


def test_block_that_one_group_gives_up_serves_another():
    cache = CacheManager(num_blocks=8, block_size=4, prefix_cache=False, groups=[FULL, WINDOW])
    cache.add("a")
    run(cache, "a", [], 0, 12)
    assert run(cache, "a", [], 12, 13).updates == (TableUpdate(3, (4,)), TableUpdate(0, (0, 5, 6, 7)))
    assert cache.num_free == 0


def test_fork_copies_the_last_block_of_every_group():
    cache = CacheManager(num_blocks=20, block_size=4, groups=[FULL, WINDOW])
    cache.add("a")
    cache.allocate("a", 0, 6)
    cache.fork("a", "b")
    allocation = cache.allocate("b", 6, 1)
    assert allocation.copies == (BlockCopy(2, 5), BlockCopy(4, 6))
    assert allocation.updates == (TableUpdate(1, (5,)), TableUpdate(1, (6,)))
    assert cache.allocate("a", 6, 1) is UNCHANGED


def test_hit_needs_all_groups_but_of_a_window_only_the_last_blocks():
    cache = CacheManager(num_blocks=30, block_size=4, groups=[FULL, WINDOW])
    tokens = list(range(100))
    cache.add("a")
    for start in range(0, 20, 4):
        run(cache, "a", tokens, start, start + 4)
    full, window = cache.block_ids("a")
    cache.free("a")
    assert cache.match("b", tokens[:17]) == 16
    assert cache.block_ids("b") == (full[:4], [0, 0, *window[2:4]])
    assert cache.stats().num_used == 6


def test_hit_is_shortened_to_what_the_window_has():
    cache = CacheManager(num_blocks=11, block_size=4, groups=[FULL, WINDOW])
    tokens = list(range(100))
    cache.add("a")
    run(cache, "a", tokens, 0, 20)  # all at once: nothing is behind the window while it is computed
    full, window = cache.block_ids("a")
    assert (full, window) == ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10])
    cache.free("a")
    cache.add("other")
    assert cache.allocate("other", 0, 4).updates == (TableUpdate(0, (10,)), TableUpdate(0, (5,)))  # both tails evicted
    assert cache.match("b", tokens[:21]) == 16
    assert cache.block_ids("b") == ([1, 2, 3, 4], [0, 0, 8, 9])


def test_token_whose_window_was_released_can_not_be_computed_again():
    cache = CacheManager(num_blocks=10, block_size=4, groups=[WINDOW])
    tokens = list(range(100))
    cache.add("a")
    run(cache, "a", tokens, 0, 16)
    run(cache, "a", tokens, 16, 20)
    with pytest.raises(InvalidArgument, match="token 12 can not be computed again"):
        cache.allocate("a", 12, 1)
    assert cache.allocate("a", 13, 1).copies == (BlockCopy(4, 6),)


def test_freed_groups_are_evicted_from_their_common_tail():
    cache = CacheManager(num_blocks=7, block_size=2, groups=[FULL, FULL])
    cache.add("a")
    run(cache, "a", [1, 2, 3, 4, 5, 6], 0, 6)
    assert cache.block_ids("a") == ([1, 2, 3], [4, 5, 6])
    cache.free("a")
    cache.add("b")
    assert cache.allocate("b", 0, 4).updates == (TableUpdate(0, (6, 3)), TableUpdate(0, (5, 2)))
    assert cache.match("c", [1, 2, 3, 4, 5, 6, 7]) == 2
