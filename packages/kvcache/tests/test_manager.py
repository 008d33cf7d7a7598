import pytest

from octavo_kvcache import (
    UNCHANGED,
    Allocation,
    BlockCopy,
    CacheFull,
    CacheManager,
    DuplicateSequence,
    InvalidArgument,
    TableUpdate,
    UnknownSequence,
)


def prefill(cache: CacheManager, seq_id: str, token_ids: list[int], **match_options: bytes) -> int:
    """Match, compute and commit a whole prompt; return the number of cached tokens."""
    num_cached = cache.match(seq_id, token_ids, **match_options)
    cache.allocate(seq_id, num_cached, len(token_ids) - num_cached)
    cache.commit(seq_id, token_ids, len(token_ids))
    return num_cached


def appended(first_index: int, *block_ids: int) -> Allocation:
    return Allocation(updates=(TableUpdate(first_index, block_ids),))


def replaced(index: int, src: int, dst: int) -> Allocation:
    return Allocation(copies=(BlockCopy(src, dst),), updates=(TableUpdate(index, (dst,)),))


def snapshot(cache: CacheManager, *seq_ids: str) -> tuple[object, ...]:
    return (cache.stats(), *(cache.block_ids(seq_id) for seq_id in seq_ids))


# Growth


def test_blocks_are_allocated_per_chunk_and_only_when_one_is_full():
    cache = CacheManager(num_blocks=10, block_size=4)
    cache.add("a")
    assert cache.allocate("a", 0, 6) == appended(0, 1, 2)
    assert cache.allocate("a", 6, 2) is UNCHANGED
    assert cache.allocate("a", 8, 1) == appended(2, 3)
    assert cache.block_ids("a") == ([1, 2, 3],)


def test_rejected_tokens_are_overwritten_in_place():
    cache = CacheManager(num_blocks=10, block_size=4)
    cache.add("a")
    cache.allocate("a", 0, 7)
    cache.allocate("a", 7, 4)  # one token and three drafts, of which none is accepted
    assert cache.block_ids("a") == ([1, 2, 3],)
    assert cache.allocate("a", 8, 4) is UNCHANGED
    assert cache.stats().num_live_tokens == 12


def test_allocation_of_no_tokens_changes_nothing():
    cache = CacheManager(num_blocks=10, block_size=4)
    cache.add("a")
    assert cache.allocate("a", 0, 0) is UNCHANGED
    cache.allocate("a", 0, 6)
    cache.fork("a", "b")
    assert cache.allocate("b", 6, 0) is UNCHANGED  # nothing is written, so nothing is copied
    assert cache.allocate("b", 6, 1) == replaced(1, src=2, dst=3)


def test_full_cache_changes_nothing():
    cache = CacheManager(num_blocks=5, block_size=4)
    cache.add("a")
    cache.add("b")
    cache.allocate("a", 0, 6)
    cache.allocate("b", 0, 4)
    cache.fork("a", "c")
    before = snapshot(cache, "a", "b", "c")
    assert not cache.can_allocate("c", 6, 3)
    with pytest.raises(CacheFull) as caught:
        cache.allocate("c", 6, 3)  # the copy of a shared block and one more
    assert (caught.value.wanted, caught.value.free, caught.value.total) == (2, 1, 4)
    assert snapshot(cache, "a", "b", "c") == before
    assert cache.can_allocate("c", 6, 2)
    assert cache.allocate("c", 6, 2) == replaced(1, src=2, dst=4)


@pytest.mark.parametrize(
    ("num_computed_tokens", "num_new_tokens"), [(-1, 2), (6, -1), (7, 1)], ids=["before 0", "negative", "gap"]
)
def test_impossible_ranges_are_refused(num_computed_tokens, num_new_tokens):
    cache = CacheManager(num_blocks=5, block_size=4)
    cache.add("a")
    cache.allocate("a", 0, 6)
    for call in (cache.allocate, cache.can_allocate):
        with pytest.raises(InvalidArgument, match="can not be allocated after 6 tokens"):
            call("a", num_computed_tokens, num_new_tokens)


# Fork and copy-on-write


def test_four_samples_hold_a_300_token_prompt_once_and_the_last_writes_in_place():
    cache = CacheManager(num_blocks=100, block_size=16)
    prompt = list(range(300))
    prefill(cache, "0", prompt)
    for child in ("1", "2", "3"):
        cache.fork("0", child)
    table = list(range(1, 20))  # 18 full blocks and one with 12 tokens
    assert [cache.block_ids(seq_id) for seq_id in "0123"] == [(table,)] * 4
    stats = cache.stats()
    assert (stats.num_used, stats.num_shared, stats.num_table_blocks) == (19, 19, 76)

    assert cache.allocate("0", 300, 1) == replaced(18, src=19, dst=20)
    assert cache.allocate("1", 300, 1) == replaced(18, src=19, dst=21)
    assert cache.allocate("2", 300, 1) == replaced(18, src=19, dst=22)
    assert cache.allocate("3", 300, 1) is UNCHANGED
    assert [cache.block_ids(seq_id)[0][18] for seq_id in "0123"] == [20, 21, 22, 19]
    assert all(cache.block_ids(seq_id)[0][:18] == table[:18] for seq_id in "0123")
    stats = cache.stats()
    assert (stats.num_used, stats.num_shared, stats.num_copies) == (22, 18, 3)


def test_last_holder_writes_in_place_when_the_other_is_freed():
    cache = CacheManager(num_blocks=10, block_size=4)
    cache.add("a")
    cache.allocate("a", 0, 6)
    cache.fork("a", "b")
    cache.free("a")
    assert cache.allocate("b", 6, 1) is UNCHANGED
    assert cache.block_ids("b") == ([1, 2],)


def test_fork_at_a_block_boundary_copies_nothing():
    cache = CacheManager(num_blocks=10, block_size=4)
    cache.add("a")
    cache.allocate("a", 0, 8)
    cache.fork("a", "b")
    assert cache.allocate("a", 8, 1) == appended(2, 3)
    assert cache.allocate("b", 8, 1) == appended(2, 4)
    assert cache.stats().num_copies == 0


def test_fork_in_the_middle_shares_the_blocks_before_it_and_copies_the_one_it_cuts():
    cache = CacheManager(16, 4)
    cache.match("a", list(range(12)))
    cache.allocate("a", 0, 12)
    cache.commit("a", list(range(12)), 12)
    cache.fork("a", "b", num_tokens=6)
    assert cache.block_ids("b") == ([1, 2],)
    assert cache.allocate("b", 6, 1) == Allocation((BlockCopy(2, 4),), (TableUpdate(1, (4,)),))
    assert cache.block_ids("a") == ([1, 2, 3],)
    cache.commit("b", [0, 1, 2, 3, 4, 5, 99, 98], 7)
    cache.allocate("b", 7, 1)
    cache.commit("b", [0, 1, 2, 3, 4, 5, 99, 98], 8)
    cache.free("b")
    assert cache.match("c", [0, 1, 2, 3, 4, 5, 99, 98, 97]) == 8  # what the branch computed can be hit


def test_fork_after_more_tokens_than_there_are_is_refused():
    cache = CacheManager(16, 4)
    cache.match("a", [1, 2, 3])
    cache.allocate("a", 0, 3)
    with pytest.raises(InvalidArgument, match="3 tokens"):
        cache.fork("a", "b", num_tokens=4)
    assert "b" not in cache
    cache.free("a")
    assert cache.stats().num_used == 0


def test_allocate_together_counts_the_last_writer_of_a_shared_block_once():
    cache = CacheManager(5, 4)  # 4 usable: 1 shared, 2 copies, and one that a stranger has
    cache.add("stranger")
    cache.allocate("stranger", 0, 1)
    cache.add("a")
    cache.allocate("a", 0, 2)
    cache.fork("a", "b")
    cache.fork("a", "c")
    assert [len(a.copies) for a in cache.allocate_together(["a", "b", "c"], 2)] == [1, 1, 0]
    assert cache.num_free == 0
    cache.free("c")
    cache.fork("b", "c")
    cache.fork("b", "d")
    with pytest.raises(CacheFull):
        cache.allocate_together(["a", "b", "c", "d"], 3)
    assert [cache.block_ids(s) for s in "bd"] == [cache.block_ids("c")] * 2


def test_fork_of_a_fork_shares_too():
    cache = CacheManager(num_blocks=10, block_size=4)
    cache.add("a")
    cache.allocate("a", 0, 2)
    cache.fork("a", "b")
    cache.fork("b", "c")
    assert cache.allocate("b", 2, 1) == replaced(0, src=1, dst=2)
    cache.fork("b", "d")
    assert cache.allocate("d", 3, 1) == replaced(0, src=2, dst=3)
    assert cache.allocate("a", 2, 1) == replaced(0, src=1, dst=4)
    assert cache.allocate("c", 2, 1) is UNCHANGED
    assert cache.allocate("b", 3, 1) is UNCHANGED


def test_shared_block_past_the_tokens_is_replaced_without_a_copy():
    cache = CacheManager(num_blocks=10, block_size=4)
    cache.add("a")
    cache.allocate("a", 0, 7)
    cache.allocate("a", 7, 4)  # drafts reach into block 3
    cache.fork("a", "b")
    allocation = cache.allocate("b", 7, 4)  # all of them were rejected
    assert allocation == Allocation((BlockCopy(2, 4),), (TableUpdate(1, (4, 5)),))


# Prefix cache


def test_committed_full_blocks_are_hit_but_never_the_whole_prompt():
    cache = CacheManager(num_blocks=20, block_size=4)
    prompt = list(range(12))
    assert prefill(cache, "a", prompt) == 0
    assert cache.match("b", prompt[:9]) == 8
    assert cache.block_ids("b") == ([1, 2],)
    assert cache.allocate("b", 8, 1) == appended(2, 4)
    assert cache.match("c", [*prompt, 99]) == 12
    assert cache.block_ids("c") == ([1, 2, 3],)
    assert cache.match("d", [0, 1, 2, 3, 5, 5, 6, 7, 8]) == 4
    assert cache.match("e", [1, *prompt]) == 0


def test_block_is_hit_only_after_it_is_full_and_committed():
    cache = CacheManager(num_blocks=20, block_size=4)
    tokens = list(range(9))
    cache.match("a", tokens)
    cache.allocate("a", 0, 9)
    assert cache.match("b", tokens) == 0
    cache.commit("a", tokens, 7)
    assert cache.match("c", tokens) == 4
    cache.commit("a", tokens, 8)
    assert cache.match("d", tokens) == 8


def test_generated_tokens_are_hit_by_the_next_turn():
    cache = CacheManager(num_blocks=20, block_size=4)
    tokens = [1, 2, 3, 4, 5]
    prefill(cache, "a", tokens)
    for token in range(6, 10):
        cache.allocate("a", len(tokens), 1)
        tokens.append(token)
        cache.commit("a", tokens, len(tokens))
    cache.free("a")
    assert cache.match("b", [*tokens, 50, 51, 52]) == 8


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"salt": b"x"}, {}),
        ({"salt": b"x"}, {"salt": b"y"}),
        ({"adapter": b"x"}, {}),
        ({"adapter": b"x"}, {"salt": b"x"}),
    ],
    ids=str,
)
def test_another_salt_or_adapter_is_never_hit(first, second):
    cache = CacheManager(num_blocks=20, block_size=4)
    prompt = list(range(9))
    prefill(cache, "a", prompt, **first)
    assert cache.match("b", prompt, **second) == 0
    assert cache.match("c", prompt, **first) == 8


def test_another_image_is_not_hit_from_its_block_on():
    cache = CacheManager(num_blocks=20, block_size=4)
    prompt = [1, 2, 3, 4, 0, 0, 0, 0, 5]
    cache.match("a", prompt, extra_keys={1: b"cat"})
    cache.allocate("a", 0, 9)
    cache.commit("a", prompt, 9)
    assert cache.match("b", prompt, extra_keys={1: b"dog"}) == 4
    assert cache.match("c", prompt, extra_keys={1: b"cat"}) == 8


def test_freed_prefix_is_evicted_tail_first_and_least_recently_used_first():
    cache = CacheManager(num_blocks=7, block_size=2)
    prefill(cache, "a", [1, 2, 3, 4, 5])  # blocks 1 2 full, 3 partial
    prefill(cache, "b", [6, 7, 8, 9, 10])  # blocks 4 5 full, 6 partial
    cache.free("a")
    cache.free("b")
    # the partial blocks hold nothing that can be hit: last freed, first used; then a's tail, a's head, b's tail
    cache.add("c")
    assert cache.allocate("c", 0, 10) == appended(0, 6, 3, 2, 1, 5)
    assert cache.stats().num_evictions == 3
    assert cache.match("d", [1, 2, 3, 4, 5]) == 0
    assert cache.match("e", [6, 7, 8, 9, 10]) == 2
    assert cache.block_ids("e") == ([4],)


def test_hit_makes_blocks_the_most_recently_used():
    cache = CacheManager(num_blocks=7, block_size=2)
    prefill(cache, "a", [1, 2, 3])
    prefill(cache, "b", [4, 5, 6])
    for seq_id in "ab":
        cache.free(seq_id)
    cache.match("c", [1, 2, 3])
    cache.free("c")
    cache.add("d")
    assert cache.allocate("d", 0, 10) == appended(0, 4, 2, 5, 6, 3)  # unhashed 4 2 5 6, then b's block 3
    assert cache.match("e", [1, 2, 3]) == 2


def test_held_prefix_is_not_evicted():
    cache = CacheManager(num_blocks=4, block_size=2)
    prefill(cache, "a", [1, 2, 3])
    cache.free("a")
    cache.match("b", [1, 2, 3])
    cache.add("c")
    with pytest.raises(CacheFull):
        cache.allocate("c", 0, 6)
    assert cache.allocate("c", 0, 4) == appended(0, 2, 3)


def test_identical_blocks_computed_at_the_same_time_stay_private():
    cache = CacheManager(num_blocks=10, block_size=2)
    for seq_id in "ab":
        cache.match(seq_id, [1, 2, 3])
        cache.allocate(seq_id, 0, 3)
    for seq_id in "ab":
        cache.commit(seq_id, [1, 2, 3], 3)
    assert [cache.block_ids(seq_id) for seq_id in "ab"] == [([1, 2],), ([3, 4],)]
    cache.free("a")
    cache.free("b")
    assert cache.stats().num_cached == 1
    cache.match("c", [1, 2, 9])
    assert cache.block_ids("c") == ([1],)


def test_cached_block_that_is_written_again_where_no_other_is_free_is_no_longer_hit():
    cache = CacheManager(num_blocks=4, block_size=2)
    prefill(cache, "a", [1, 2, 3, 4, 5])
    assert cache.allocate("a", 3, 2) is UNCHANGED
    assert cache.match("b", [1, 2, 3, 4, 5]) == 2
    cache.commit("a", [1, 2, 3, 9, 9], 5)
    assert cache.match("c", [1, 2, 3, 4, 5]) == 3
    assert cache.match("d", [1, 2, 3, 9, 9]) == 4


def test_shared_cached_block_that_is_written_again_is_copied_and_still_hit():
    cache = CacheManager(num_blocks=10, block_size=2)
    prefill(cache, "a", [1, 2, 3, 4, 5])
    cache.match("b", [1, 2, 3, 4, 5])
    assert cache.allocate("a", 3, 2).copies == (BlockCopy(2, 4),)
    assert cache.match("c", [1, 2, 3, 4, 5]) == 4
    assert cache.block_ids("c") == ([1, 2],)


def test_added_sequence_is_computed_whole_and_cached_for_others():
    cache = CacheManager(num_blocks=10, block_size=2)
    for seq_id in "ab":
        cache.add(seq_id, salt=b"x")
        cache.allocate(seq_id, 0, 3)
        cache.commit(seq_id, [1, 2, 3], 3)
    assert cache.stats().lookups.num_lookups == 0
    assert cache.match("c", [1, 2, 3], b"x") == 2


def test_switched_off_prefix_cache_never_hits():
    cache = CacheManager(num_blocks=10, block_size=2, prefix_cache=False)
    assert prefill(cache, "a", [1, 2, 3]) == 0
    assert prefill(cache, "b", [1, 2, 3]) == 0
    cache.reset_prefix_cache()
    cache.free("a")
    stats = cache.stats()
    assert (stats.num_cached, stats.lookups.num_query_tokens, stats.hit_rate) == (0, 0, 0.0)


def test_reset_forgets_and_running_sequences_cache_nothing_more():
    cache = CacheManager(num_blocks=10, block_size=2)
    prefill(cache, "a", [1, 2, 3])
    prefill(cache, "b", [4, 5, 6])
    cache.free("b")
    cache.reset_prefix_cache()
    assert cache.stats().num_cached == 0
    assert cache.match("c", [4, 5, 6]) == 0
    assert cache.match("d", [1, 2, 3]) == 0
    cache.allocate("a", 3, 2)
    cache.commit("a", [1, 2, 3, 7, 8], 5)
    cache.fork("a", "e")
    cache.allocate("e", 3, 3)
    cache.commit("e", [1, 2, 3, 7, 8, 9], 6)
    prefill(cache, "f", [1, 2, 9])  # with the new weights; what a and e wrote was attended to with the old ones
    assert cache.match("g", [1, 2, 3, 7, 8, 9]) == 2
    assert cache.block_ids("g")[0] == cache.block_ids("f")[0][:1]


def test_lookup_is_counted_when_the_sequence_is_admitted():
    cache = CacheManager(num_blocks=6, block_size=2)
    prefill(cache, "a", [1, 2, 3])
    cache.add("big")
    cache.allocate("big", 0, 4)
    for _ in range(3):
        assert cache.match("b", [1, 2, 3, 4, 5, 6]) == 2
        with pytest.raises(CacheFull):
            cache.allocate("b", 2, 4)
        cache.free("b")
    assert cache.stats().lookups.num_query_tokens == 3
    cache.free("big")
    prefill(cache, "b", [1, 2, 3, 4, 5, 6])
    stats = cache.stats()
    assert (stats.lookups.num_query_tokens, stats.lookups.num_hit_tokens) == (9, 2)
    assert stats.hit_rate == 2 / 9


def test_commit_refuses_what_was_not_allocated_or_given():
    cache = CacheManager(num_blocks=10, block_size=2)
    cache.add("a")
    cache.allocate("a", 0, 4)
    with pytest.raises(InvalidArgument, match="more than the 4 tokens allocated"):
        cache.commit("a", [1, 2, 3, 4, 5], 5)
    with pytest.raises(InvalidArgument, match=r"must be 2 integers .* got \[3\]"):
        cache.commit("a", [1, 2, 3], 4)
    cache.commit("a", [1, 2, 3, 4], 4)
    assert cache.match("b", [1, 2, 3, 4, 5]) == 4


def test_match_of_an_impossible_token_leaves_no_sequence():
    cache = CacheManager(num_blocks=10, block_size=2)
    with pytest.raises(InvalidArgument, match="placeholders can not be committed"):
        cache.match("a", [1, -1, 2])
    assert "a" not in cache


# Release


def test_blocks_of_a_step_in_flight_are_freed_when_it_is_done():
    cache = CacheManager(num_blocks=7, block_size=4)
    for seq_id in "abc":
        cache.add(seq_id)
        cache.allocate(seq_id, 0, 8)
    cache.free("a", after=7)
    cache.free("b", after=6)
    cache.free("c", after=8)
    stats = cache.stats()
    assert (stats.num_free, stats.num_parked, stats.num_sequences) == (0, 6, 0)
    cache.step_done(5)
    assert cache.num_free == 0
    cache.step_done(7)
    assert cache.num_free == 4
    cache.add("d")
    assert cache.allocate("d", 0, 16) == appended(0, 3, 4, 1, 2)  # parked first, freed first; last freed, first used
    cache.step_done(8)
    assert (cache.num_free, cache.stats().num_parked) == (2, 0)


def test_step_that_is_done_parks_nothing():
    cache = CacheManager(num_blocks=7, block_size=4)
    cache.add("a")
    cache.allocate("a", 0, 8)
    cache.step_done(3)
    cache.free("a", after=3)
    assert cache.num_free == 6


def test_parked_block_is_copied_not_written_in_place():
    cache = CacheManager(num_blocks=7, block_size=4)
    cache.add("a")
    cache.allocate("a", 0, 2)
    cache.fork("a", "b")
    cache.free("a", after=1)
    assert cache.allocate("b", 2, 1) == replaced(0, src=1, dst=2)  # the step in flight may still write to block 1


def test_ids_are_checked():
    cache = CacheManager(num_blocks=7, block_size=4)
    cache.add("a")
    for call in (lambda: cache.add("a"), lambda: cache.match("a", [1]), lambda: cache.fork("a", "a")):
        with pytest.raises(DuplicateSequence, match="'a' exists already"):
            call()
    for call in (
        lambda: cache.free(7),
        lambda: cache.fork(7, "b"),
        lambda: cache.allocate(7, 0, 1),
        lambda: cache.can_allocate(7, 0, 1),
        lambda: cache.commit(7, [], 0),
        lambda: cache.block_ids(7),
    ):
        with pytest.raises(UnknownSequence, match="sequence 7 does not exist"):
            call()
    assert "b" not in cache


def test_block_ids_are_a_copy():
    cache = CacheManager(num_blocks=7, block_size=4)
    cache.add("a")
    cache.allocate("a", 0, 8)
    cache.block_ids("a")[0].clear()
    assert cache.block_ids("a") == ([1, 2],)


def test_block_size_must_be_positive():
    with pytest.raises(InvalidArgument, match="block_size 0 and min_partial_hit 1 must be at least 1"):
        CacheManager(num_blocks=7, block_size=0)


def test_a_new_root_hits_nothing_of_the_old_one_not_even_what_is_registered_after():
    cache = CacheManager(num_blocks=9, block_size=4, root=b"old")
    cache.match("running", [1, 2, 3, 4, 5])
    cache.allocate("running", 0, 5)
    cache.reset_prefix_cache(b"new")
    cache.commit("running", [1, 2, 3, 4, 5], 5)
    cache.free("running", token_ids=[1, 2, 3, 4, 5])
    assert cache.match("after", [1, 2, 3, 4, 5]) == 0
    cache.allocate("after", 0, 5)
    cache.commit("after", [1, 2, 3, 4, 5], 5)
    cache.reset_prefix_cache()
    assert cache.match("again", [1, 2, 3, 4, 5]) == 0


def test_equal_tokens_have_other_hashes_under_another_root():
    cache = CacheManager(num_blocks=9, block_size=4, root=b"old")
    hashes = []
    for root in (None, b"new", b"old"):
        cache.reset_prefix_cache(root)
        cache.match("a", [1, 2, 3, 4, 5])
        cache.allocate("a", 0, 5)
        cache.commit("a", [1, 2, 3, 4, 5], 5)
        hashes.append(cache._pool.block_hash(cache.block_ids("a")[0][0]))
        cache.free("a")
    assert hashes[0] == hashes[2] != hashes[1]
