"""Hits that end within a cached block."""

import pytest

from octavo_kvcache import UNCHANGED, Allocation, BlockCopy, CacheFull, CacheManager, KVCacheSpec, TableUpdate


def prefill(cache: CacheManager, seq_id: str, token_ids: list[int], **match_options: object) -> int:
    num_cached = cache.match(seq_id, token_ids, **match_options)
    cache.allocate(seq_id, num_cached, len(token_ids) - num_cached)
    cache.commit(seq_id, token_ids, len(token_ids))
    return num_cached


def cached(tokens: list[int], num_blocks: int = 20, **options: object) -> CacheManager:
    """Return a cache of blocks of 4 tokens in which nobody runs any more that computed these."""
    cache = CacheManager(num_blocks, 4, **options)
    prefill(cache, "first", tokens)
    cache.free("first")
    return cache


def test_block_that_begins_alike_is_shared_up_to_where_it_differs_and_copied_by_the_first_write():
    cache = cached([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert cache.match("a", [1, 2, 3, 4, 5, 6, 70, 80, 90]) == 6
    assert cache.block_ids("a") == ([1, 2],)
    # block 3 held a token of the first sequence and no full block, so it is free and taken first
    assert cache.allocate("a", 6, 3) == Allocation((BlockCopy(2, 3),), (TableUpdate(1, (3, 4)),))
    cache.commit("a", [1, 2, 3, 4, 5, 6, 70, 80, 90], 9)
    assert cache.match("b", [1, 2, 3, 4, 5, 6, 7, 8, 0]) == 8  # what was hit in part is still cached
    assert cache.block_ids("b") == ([1, 2],)
    assert cache.match("c", [1, 2, 3, 4, 5, 6, 70, 80, 0]) == 8  # and so is the new block
    assert cache.block_ids("c") == ([1, 3],)


def test_first_block_may_be_hit_in_part():
    cache = cached([1, 2, 3, 4, 5])
    assert cache.match("a", [1, 2, 9]) == 2
    assert cache.allocate("a", 2, 1) == Allocation((BlockCopy(1, 2),), (TableUpdate(0, (2,)),))


def test_last_token_is_left_to_compute():
    cache = cached([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert cache.match("a", [1, 2, 3, 4, 5, 6, 7, 8]) == 7
    assert cache.match("b", [1, 2, 3, 4, 5]) == 4
    assert cache.block_ids("b") == ([1],)
    assert cache.match("c", [1]) == 0


def test_block_that_agrees_longest_is_taken():
    cache = CacheManager(20, 4)
    for name, tokens in {"x": [1, 2, 3, 4], "y": [1, 2, 7, 7], "z": [1, 9, 9, 9]}.items():
        prefill(cache, name, [*tokens, 0])
    assert cache.match("a", [1, 2, 7, 8, 8]) == 3
    assert cache.block_ids("a") == ([3],)
    assert cache.match("b", [1, 9, 0, 0, 0]) == 2
    assert cache.block_ids("b") == ([5],)


def test_block_that_somebody_else_holds_is_copied_too():
    cache = CacheManager(20, 4)
    prefill(cache, "runs", [1, 2, 3, 4, 5])
    assert cache.match("a", [1, 2, 9, 9]) == 2
    assert cache.allocate("a", 2, 2).copies == (BlockCopy(1, 3),)
    assert cache.block_ids("runs") == ([1, 2],)


def test_hit_block_is_the_most_recently_used_afterwards():
    cache = cached([1, 2, 3, 4, 5], num_blocks=5)
    prefill(cache, "other", [6, 6, 6, 6, 6])
    cache.free("other")
    cache.match("a", [1, 2, 9, 9])
    cache.allocate("a", 2, 2)
    cache.add("big")
    cache.allocate("big", 0, 8)  # evicts the block of sixes first
    assert cache.match("b", [1, 2, 3, 4, 0]) == 4
    cache.free("b")
    assert cache.match("c", [6, 6, 6, 6, 0]) == 0


def test_without_a_free_block_the_hit_one_is_written_in_place_and_forgotten():
    """Two blocks in all: to write in place gives up what an eviction would, and the sequence need not wait for ever."""
    cache = cached([1, 2, 3, 4], num_blocks=3)
    assert cache.match("a", [1, 2, 9, 9, 9]) == 2
    assert cache.can_allocate("a", 2, 6)
    assert cache.allocate("a", 2, 6) == Allocation((), (TableUpdate(1, (2,)),))
    cache.commit("a", [1, 2, 9, 9, 9, 9, 9, 9], 8)
    assert cache.match("b", [1, 2, 3, 4, 0]) == 2
    assert cache.match("c", [1, 2, 9, 9, 0]) == 4


def test_without_a_free_block_a_held_one_is_not_written():
    cache = CacheManager(3, 4)
    prefill(cache, "runs", [1, 2, 3, 4])
    cache.add("other")
    cache.allocate("other", 0, 1)
    assert cache.match("a", [1, 2, 9]) == 2
    assert not cache.can_allocate("a", 2, 1)
    with pytest.raises(CacheFull) as caught:
        cache.allocate("a", 2, 1)
    assert (caught.value.wanted, caught.value.free) == (1, 0)


def test_several_that_grow_together_take_no_block_to_spare_a_cached_one():
    cache = CacheManager(6, 2)
    prefill(cache, "first", [1, 2, 3, 4, 5])
    cache.free("first")
    assert cache.match("a", [1, 2, 3, 9]) == 3
    cache.add("b")
    cache.allocate("b", 0, 3)
    cache.fork("b", "c")
    in_place, copied, last = cache.allocate_together(["a", "b", "c"], 3)
    assert (in_place, last) == (UNCHANGED, UNCHANGED)
    assert copied == Allocation((BlockCopy(4, 5),), (TableUpdate(1, (5,)),))


def test_tokens_taken_back_into_a_cached_block_leave_it_cached():
    cache = CacheManager(10, 2)
    prefill(cache, "a", [1, 2, 3, 4, 5])
    assert cache.allocate("a", 3, 2) == Allocation((BlockCopy(2, 4),), (TableUpdate(1, (4,)),))
    assert cache.match("b", [1, 2, 3, 4, 5]) == 4
    assert cache.allocate("a", 4, 1) is UNCHANGED


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"salt": b"one"}, {"salt": b"two"}),
        ({"salt": b"one"}, {}),
        ({"adapter": b"one"}, {"adapter": b"two"}),
        ({"extra_keys": {0: b"image"}}, {"extra_keys": {0: b"other"}}),
        ({"extra_keys": {0: b"image"}}, {}),
        ({}, {"extra_keys": {0: b"image"}}),
        ({"extra_keys": {0: b"image"}}, {"extra_keys": {0: b"image"}}),
    ],
    ids=["salt", "no salt", "adapter", "image", "no image", "image only now", "same image"],
)
def test_what_the_tokens_do_not_tell_is_not_hit_in_part(first, second):
    cache = CacheManager(20, 4)
    prefill(cache, "a", [1, 2, 3, 4, 5], **first)
    assert cache.match("b", [1, 2, 3, 9, 9], **second) == 0


def test_image_behind_the_block_does_not_matter():
    cache = CacheManager(20, 4)
    prefill(cache, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9], extra_keys={1: b"image"})
    assert cache.match("b", [1, 2, 9], extra_keys={1: b"other"}) == 2


def test_several_groups_hit_whole_blocks_only():
    full, window = KVCacheSpec(1, 8), KVCacheSpec(1, 8, kind="window", window=5)
    for groups in ([window], [full, window]):
        cache = CacheManager(20, 4, groups=groups)
        prefill(cache, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9])
        assert cache.match("b", [1, 2, 3, 4, 5, 6, 0, 0]) == 4


@pytest.mark.parametrize(("least", "num_cached"), [(1, 2), (2, 2), (3, 0), (4, 0)])
def test_shortest_hit_in_part_is_chosen(least, num_cached):
    cache = cached([1, 2, 3, 4, 5], min_partial_hit=least)
    assert cache.match("a", [1, 2, 9, 9, 9]) == num_cached


def test_evicted_and_forgotten_blocks_are_not_hit_in_part():
    cache = cached([1, 2, 3, 4, 5], num_blocks=4)
    cache.add("big")
    cache.allocate("big", 0, 12)
    assert cache.match("a", [1, 2, 9]) == 0
    cache.free("big")
    prefill(cache, "b", [1, 2, 3, 4, 5])
    cache.free("b")
    cache.reset_prefix_cache()
    assert cache.match("c", [1, 2, 9]) == 0


def test_slots_are_counted_while_a_block_is_hit_in_part():
    cache = cached([1, 2, 3, 4, 5])
    cache.match("a", [1, 2, 9])
    stats = cache.stats()
    assert (stats.num_used, stats.num_live_tokens, cache.waste) == (1, 2, 0.5)
    cache.free("a")
    cache.match("b", [1, 2, 9])
    cache.allocate("b", 2, 1)
    stats = cache.stats()
    assert (stats.num_used, stats.num_live_tokens, stats.num_cached, stats.num_copies) == (1, 3, 1, 1)


def test_lookups_are_counted_by_kind_and_by_admission():
    cache = cached([1, 2, 3, 4, 5, 6, 7, 8, 9])
    cache.match("a", [1, 2, 3, 4, 5, 6, 0])
    cache.allocate("a", 6, 1)
    cache.free("a")
    cache.match("a", [1, 2, 3, 4, 5, 6, 0, 0], resumed=True)
    cache.allocate("a", 6, 2)
    cache.match("waits", [1, 2, 3, 4])
    stats = cache.stats()
    first, resumed = stats.lookups, stats.resumed_lookups
    assert (first.num_lookups, first.num_query_tokens) == (2, 16)
    assert (first.num_full_hit_tokens, first.num_partial_hit_tokens, first.num_hit_tokens) == (4, 2, 6)
    assert (resumed.num_lookups, resumed.num_query_tokens, resumed.num_hit_tokens) == (1, 8, 6)
    assert stats.hit_rate == 6 / 16


# Ends of sequences, which fill no block


def end(cache: CacheManager, seq_id: str, token_ids: list[int], **match_options: object) -> int:
    """Compute a sequence and free it with its tokens; return the number of cached ones."""
    num_cached = prefill(cache, seq_id, token_ids, **match_options)
    cache.free(seq_id, token_ids=token_ids)
    return num_cached


def test_end_of_a_sequence_is_hit_by_the_one_that_goes_on_from_it():
    cache = CacheManager(20, 4)
    end(cache, "turn 1", [1, 2, 3, 4, 5, 6])
    assert cache.stats().num_cached == 2
    assert cache.match("turn 2", [1, 2, 3, 4, 5, 6, 7]) == 6
    assert cache.block_ids("turn 2") == ([1, 2],)
    assert cache.allocate("turn 2", 6, 1) == Allocation((BlockCopy(2, 3),), (TableUpdate(1, (3,)),))
    assert cache.match("other", [1, 2, 3, 4, 5, 9]) == 5


def test_only_committed_tokens_of_an_end_are_hit():
    cache = CacheManager(20, 4)
    cache.match("a", [1, 2, 3, 4])
    cache.allocate("a", 0, 4)
    cache.commit("a", [1, 2], 2)
    cache.free("a", token_ids=[1, 2, 3, 4])
    assert cache.match("b", [1, 2, 3, 4, 5]) == 2


def test_end_that_says_less_than_another_block_is_not_kept():
    cache = CacheManager(20, 4)
    end(cache, "long", [1, 2, 3])
    end(cache, "short", [1, 2])
    assert cache.stats().num_cached == 1
    assert cache.match("a", [1, 2, 3, 9]) == 3
    cache.free("a")
    end(cache, "longer", [1, 2, 3, 4, 5])  # block 1 is of no more use
    assert cache.stats().num_cached == 2
    end(cache, "longest", [1, 2, 3, 4, 5, 6])
    assert cache.stats().num_cached == 2
    assert cache.match("b", [1, 2, 3, 4, 5, 6, 7]) == 6


def test_end_that_somebody_holds_stays_although_another_says_more():
    cache = CacheManager(20, 4)
    end(cache, "short", [1, 2])
    assert cache.match("holds", [1, 2, 9]) == 2
    end(cache, "long", [1, 2, 3])
    assert cache.match("a", [1, 2, 3, 9]) == 3
    assert cache.allocate("holds", 2, 1).copies == (BlockCopy(1, 3),)


def test_end_that_a_fork_shares_is_left_to_it():
    cache = CacheManager(20, 4)
    prefill(cache, "a", [1, 2])
    cache.fork("a", "b")
    cache.free("a", token_ids=[1, 2])
    assert cache.match("c", [1, 2, 9]) == 0
    assert cache.allocate("b", 2, 1) is UNCHANGED
    cache.commit("b", [1, 2, 3], 3)
    cache.free("b", token_ids=[1, 2, 3])
    assert cache.match("d", [1, 2, 3, 9]) == 3


def test_end_in_use_by_a_step_in_flight_is_hit_but_not_given_away():
    cache = CacheManager(3, 4)
    prefill(cache, "a", [1, 2])
    cache.free("a", after=5, token_ids=[1, 2])
    assert cache.match("b", [1, 2, 9]) == 2
    assert cache.allocate("b", 2, 1).copies == (BlockCopy(1, 2),)
    cache.step_done(5)
    assert cache.num_free == 1


def test_ends_are_evicted_before_the_blocks_before_them():
    cache = CacheManager(4, 4)
    end(cache, "a", [1, 2, 3, 4, 5, 6])
    cache.add("big")
    cache.allocate("big", 0, 8)
    assert cache.match("b", [1, 2, 3, 4, 5, 6, 7]) == 4


@pytest.mark.parametrize(
    ("options", "match_options"),
    [
        ({"min_partial_hit": 4}, {}),
        ({"prefix_cache": False}, {}),
        ({"groups": [KVCacheSpec(1, 8, kind="window", window=5)]}, {}),
        ({}, {"extra_keys": {0: b"image"}}),
    ],
    ids=["whole blocks only", "switched off", "window", "image"],
)
def test_ends_that_can_not_be_hit_are_given_up(options, match_options):
    cache = CacheManager(20, 4, **options)
    end(cache, "a", [1, 2, 3], **match_options)
    assert cache.stats().num_cached == 0


def test_ends_of_before_a_reset_are_not_hit():
    cache = CacheManager(20, 4)
    prefill(cache, "a", [1, 2, 3])
    end(cache, "b", [7, 8])
    cache.reset_prefix_cache()
    cache.free("a", token_ids=[1, 2, 3])
    assert cache.match("c", [1, 2, 3, 4]) == 0
    assert cache.match("d", [7, 8, 9]) == 0


def test_ends_of_another_salt_are_not_hit():
    cache = CacheManager(20, 4)
    end(cache, "a", [1, 2, 3], salt=b"one")
    assert cache.match("b", [1, 2, 3, 4], b"two") == 0
    assert cache.match("c", [1, 2, 3, 4], b"one") == 3
