import pytest

from octavo_kvcache import (
    DEVICE,
    HOST,
    BlockCopy,
    CacheFull,
    CacheManager,
    DuplicateSequence,
    InvalidArgument,
    KVCacheSpec,
    SwapSize,
    UnknownSequence,
)


def outs(*pairs: tuple[int, int]) -> list[BlockCopy]:
    return [BlockCopy(src, dst, DEVICE, HOST) for src, dst in pairs]


def ins(*pairs: tuple[int, int]) -> list[BlockCopy]:
    return [BlockCopy(src, dst, HOST, DEVICE) for src, dst in pairs]


def make(num_blocks: int = 12, num_host_blocks: int = 12, **options) -> CacheManager:
    return CacheManager(num_blocks, 4, num_host_blocks=num_host_blocks, **options)


def prefill(cache: CacheManager, seq_id: str, num_tokens: int, start: int = 0) -> list[int]:
    """Compute and commit the tokens start, start + 1, ...; return them."""
    token_ids = list(range(start, start + num_tokens))
    num_cached = cache.match(seq_id, token_ids)
    cache.allocate(seq_id, num_cached, num_tokens - num_cached)
    cache.commit(seq_id, token_ids, num_tokens)
    return token_ids


def fill(cache: CacheManager, num_blocks: int) -> None:
    """Give as many blocks to another sequence, so that what was free and cached is overwritten."""
    cache.add("other", salt=b"other")
    cache.allocate("other", 0, num_blocks * cache.block_size)


def host_counts(cache: CacheManager) -> tuple[int, ...]:
    stats = cache.stats()
    return stats.host.num_used, stats.host.num_sequences, stats.host.num_blocks_out, stats.host.num_blocks_in


def test_a_sequence_that_leaves_gives_its_blocks_free_at_once():
    cache = make()
    prefill(cache, "a", 10)
    assert cache.host.swap_out(["a"]) == outs((1, 1), (2, 2), (3, 3))
    assert "a" in cache.host
    assert "a" not in cache
    assert (cache.num_free, host_counts(cache)) == (11, (3, 1, 3, 0))
    fill(cache, 2)
    assert cache.block_ids("other") == ([3, 4],)


def test_blocks_that_were_overwritten_meanwhile_are_copied_back():
    cache = make(prefix_cache=False)
    prefill(cache, "a", 10)
    cache.host.swap_out(["a"])
    fill(cache, 5)
    assert cache.block_ids("other") == ([1, 2, 3, 4, 5],)
    assert cache.host.swap_in(["a"]) == ins((1, 6), (2, 7), (3, 8))
    assert cache.block_ids("a") == ([6, 7, 8],)
    assert "a" not in cache.host
    assert host_counts(cache) == (0, 0, 3, 3)
    assert cache.stats().num_live_tokens == 30


def test_blocks_that_are_cached_still_are_held_again():
    cache = make()
    tokens = prefill(cache, "a", 10)
    cache.host.swap_out(["a"])
    assert cache.host.swap_in(["a"]) == ins((3, 3))  # the partial block has no hash: anybody may have it
    assert cache.block_ids("a") == ([1, 2, 3],)
    cache.commit("a", tokens, 10)
    cache.free("a")
    assert cache.match("b", tokens) == 8


def test_what_was_copied_back_can_be_hit_once_it_is_committed():
    cache = make(num_blocks=6)
    tokens = prefill(cache, "a", 10)
    cache.host.swap_out(["a"])
    fill(cache, 4)  # evicts block 2
    cache.free("other")
    assert cache.host.swap_in(["a"]) == ins((2, 3), (3, 4))
    assert cache.block_ids("a") == ([1, 3, 4],)
    assert cache.num_committed("a") == 4  # the copies have not been made yet
    assert cache.match("b", tokens) == 4
    cache.free("b")
    cache.commit("a", tokens, 10)
    assert cache.num_committed("a") == 10
    assert cache.match("b", tokens) == 8
    assert cache.block_ids("b") == ([1, 3],)


def test_a_block_with_the_same_content_takes_the_place_of_one_that_is_gone():
    cache = make(num_blocks=6)
    tokens = prefill(cache, "a", 10)
    cache.host.swap_out(["a"])
    fill(cache, 5)  # evicts all
    cache.free("other")
    prefill(cache, "b", 9)
    assert cache.block_ids("b") == ([3, 4, 5],)
    assert cache.host.swap_in(["a"]) == ins((3, 2))
    assert cache.block_ids("a") == ([3, 4, 2],)
    cache.commit("a", tokens, 10)
    assert cache.num_committed("a") == 10


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_what_siblings_share_is_copied_once_and_shared_again(prefix_cache):
    cache = make(prefix_cache=prefix_cache)
    prefill(cache, "a", 10)
    cache.fork("a", "b")
    assert cache.host.swap_out(["a", "b"]) == outs((1, 1), (2, 2), (3, 3))
    fill(cache, 11)
    cache.free("other")
    copies = cache.host.swap_in(["a", "b"])
    assert [copy.src for copy in copies] == [1, 2, 3]
    assert cache.block_ids("a") == cache.block_ids("b") == ([copy.dst for copy in copies],)
    assert cache.allocate("a", 10, 1).copies[0].src == copies[2].dst  # the partial block is shared as before


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_siblings_that_leave_one_after_the_other_share_too(prefix_cache):
    cache = make(prefix_cache=prefix_cache)
    prefill(cache, "a", 10)
    cache.fork("a", "b")
    assert cache.host.swap_out(["a"]) == outs((1, 1), (2, 2), (3, 3))
    assert cache.host.swap_out(["b"]) == []
    fill(cache, 11)
    cache.free("other")
    first = cache.host.swap_in(["b"])
    assert [copy.src for copy in first] == [1, 2, 3]
    assert cache.host.swap_in(["a"]) == []
    assert cache.block_ids("a") == cache.block_ids("b")


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_one_that_comes_back_shares_with_those_that_stayed(prefix_cache):
    cache = make(prefix_cache=prefix_cache)
    prefill(cache, "a", 10)
    cache.fork("a", "b")
    cache.host.swap_out(["b"])
    assert cache.allocate("a", 10, 1).copies == ()  # alone with its partial block now
    assert cache.host.swap_in(["b"]) == ins((3, 4))  # which has other content since
    assert cache.block_ids("b") == ([1, 2, 4],)
    assert cache.stats().num_shared == 2


def test_a_partial_block_that_nobody_wrote_is_shared_again_and_copied_on_the_next_write():
    cache = make()
    prefill(cache, "a", 6)
    cache.fork("a", "b")
    cache.fork("a", "full", num_tokens=4)  # looks at a again
    cache.host.swap_out(["b"])
    cache.fork("a", "short", num_tokens=4)
    assert cache.host.swap_in(["b"]) == []
    assert cache.stats().num_live_tokens == 6
    assert cache.allocate("a", 6, 1).copies == (BlockCopy(2, 3),)


def test_a_block_that_is_overwritten_is_copied_out_anew():
    cache = make(prefix_cache=False)
    prefill(cache, "a", 6)
    cache.fork("a", "b")
    cache.host.swap_out(["b"])
    cache.allocate("a", 6, 1)
    assert cache.host.swap_out(["a"]) == outs((2, 3))


def test_null_blocks_of_a_window_stay_null():
    full, window = KVCacheSpec(1, 8), KVCacheSpec(1, 8, kind="window", window=5)
    cache = make(num_blocks=20, groups=[full, window])
    tokens = prefill(cache, "a", 16)
    cache.allocate("a", 16, 1)
    assert cache.block_ids("a") == ([1, 2, 3, 4, 9], [0, 0, 0, 8, 10])
    copies = cache.host.swap_out(["a"])
    assert copies == outs((1, 1), (2, 2), (3, 3), (4, 4), (8, 5), (9, 6), (10, 7))
    fill(cache, 3)
    assert [len(cache.host.swap_in(["a"])), cache.block_ids("a")[1][:3]] == [2, [0, 0, 0]]
    assert cache.block_ids("a")[0][:4] == [1, 2, 3, 4]
    cache.allocate("a", 16, 1)
    cache.commit("a", [*tokens, 7], 17)


def test_a_full_host_changes_nothing():
    cache = make(num_host_blocks=3)
    prefill(cache, "a", 10)
    before = cache.stats(), cache.block_ids("a")
    with pytest.raises(CacheFull) as caught:
        cache.host.swap_out(["a"])
    assert (caught.value.wanted, caught.value.free, caught.value.total) == (3, 2, 2)
    assert (cache.stats(), cache.block_ids("a")) == before


def test_a_full_device_changes_nothing():
    cache = make(num_blocks=6)
    prefill(cache, "a", 10)
    cache.host.swap_out(["a"])
    fill(cache, 3)
    before = cache.stats()
    with pytest.raises(CacheFull) as caught:
        cache.host.swap_in(["a"])
    assert (caught.value.wanted, caught.value.free, caught.value.total) == (3, 2, 5)
    assert cache.stats() == before
    assert "a" in cache.host


def test_blocks_asked_to_be_spared_must_be_free_beside_what_comes_back():
    cache = make(num_blocks=6)
    prefill(cache, "a", 10)
    cache.host.swap_out(["a"])
    with pytest.raises(CacheFull):
        cache.host.swap_in(["a"], num_spare=3)
    cache.host.swap_in(["a"], num_spare=2)
    assert cache.num_free == 2


def test_a_sequence_that_ends_while_it_is_swapped_out_frees_host_blocks():
    cache = make()
    prefill(cache, "a", 10)
    cache.fork("a", "b")
    cache.host.swap_out(["a", "b"])
    cache.free("a")
    assert host_counts(cache)[:2] == (3, 1)
    cache.free("b", after=7)
    assert host_counts(cache)[:2] == (0, 0)


def test_size_counts_what_is_copied_and_what_would_be_lost():
    cache = make(num_blocks=20)
    prefill(cache, "a", 10)
    assert cache.host.size(["a"]) == SwapSize(num_out=3, num_in=3, num_lost=3)
    cache.fork("a", "b")
    # Its full blocks are a's too, and can be hit; the partial one can not.
    assert cache.host.size(["b"]) == SwapSize(num_out=3, num_in=0, num_lost=1)
    assert cache.host.size(["a", "b"]) == SwapSize(num_out=3, num_in=3, num_lost=3)
    cache.host.swap_out(["b"])
    assert cache.host.size(["a"]) == SwapSize(num_out=0, num_in=3, num_lost=3)


def test_after_a_failed_step_copies_are_made_again():
    cache = make(prefix_cache=False)
    prefill(cache, "a", 6)
    cache.fork("a", "b")
    cache.host.swap_out(["b"])
    cache.host.distrust_copies()
    assert cache.host.swap_in(["b"]) == ins((1, 3), (2, 4))


def test_a_reset_of_the_prefix_cache_reaches_those_on_the_host():
    cache = make()
    tokens = prefill(cache, "a", 10)
    cache.host.swap_out(["a"])
    cache.reset_prefix_cache()
    prefill(cache, "b", 10)
    assert len(cache.host.swap_in(["a"])) == 3
    assert not set(cache.block_ids("a")[0]) & set(cache.block_ids("b")[0])
    cache.commit("a", tokens, 10)


def test_ids_on_the_host_are_in_use():
    cache = make()
    prefill(cache, "a", 10)
    prefill(cache, "b", 10, start=50)
    cache.host.swap_out(["a"])
    with pytest.raises(DuplicateSequence, match="'a' exists already"):
        cache.add("a")
    with pytest.raises(DuplicateSequence, match="'a' exists already"):
        cache.fork("b", "a")
    with pytest.raises(UnknownSequence, match="'b' is not swapped out"):
        cache.host.swap_in(["a", "b"])
    assert "a" in cache.host
    with pytest.raises(UnknownSequence):
        cache.host.swap_out(["b", "a"])
    assert "b" in cache


def test_without_host_blocks_there_is_no_host_tier():
    assert CacheManager(8, 4).host is None
    with pytest.raises(InvalidArgument, match="at least 2"):
        CacheManager(8, 4, num_host_blocks=1)
