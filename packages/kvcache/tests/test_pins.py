"""Prefixes that are held against eviction."""

import pickle

import pytest

from octavo_kvcache import CacheFull, CacheManager, DuplicatePin, InvalidArgument, PinLimit, UnknownPin


def prefill(cache: CacheManager, seq_id: str, token_ids: list[int], **match_options: object) -> int:
    num_cached = cache.match(seq_id, token_ids, **match_options)
    cache.allocate(seq_id, num_cached, len(token_ids) - num_cached)
    cache.commit(seq_id, token_ids, len(token_ids))
    return num_cached


def pin(cache: CacheManager, pin_id: str, token_ids: list[int], **match_options: object) -> int:
    """Compute a prefix and pin it, as a request for that does."""
    cache.pins.reserve(pin_id, len(token_ids))
    prefill(cache, "pinning", token_ids, **match_options)
    num_tokens = cache.pin(pin_id, "pinning")
    cache.free("pinning")
    return num_tokens


def pin_counts(cache: CacheManager) -> tuple[int, int]:
    return cache.stats().num_pins, cache.stats().num_pinned


def test_pinned_blocks_are_not_evicted_and_unpinned_ones_are():
    cache = CacheManager(6, 2, max_num_pinned=3)
    assert pin(cache, "p", [1, 2, 3, 4, 5]) == 4
    assert (pin_counts(cache), cache.num_free) == ((1, 2), 3)
    cache.add("big")
    cache.allocate("big", 0, 6)
    with pytest.raises(CacheFull):
        cache.allocate("big", 6, 1)
    assert cache.match("a", [1, 2, 3, 4, 9]) == 4
    cache.free("a")
    cache.free("big")
    cache.pins.drop("p")
    assert (pin_counts(cache), cache.num_free) == ((0, 0), 5)
    cache.add("bigger")
    cache.allocate("bigger", 0, 10)
    assert cache.match("b", [1, 2, 3, 4, 9]) == 0


def test_pinned_block_is_copied_never_written():
    cache = CacheManager(6, 2, max_num_pinned=3)
    pin(cache, "p", [1, 2, 3, 4])
    cache.match("a", [1, 2, 3, 9])
    assert [(c.src, c.dst) for c in cache.allocate("a", 3, 1).copies] == [(2, 3)]


def test_limit_is_an_error_with_numbers_and_nothing_changes():
    cache = CacheManager(10, 2, max_num_pinned=3)
    pin(cache, "p", [1, 2, 3, 4])
    with pytest.raises(PinLimit) as caught:
        cache.pins.reserve("q", 4)
    assert (caught.value.wanted, caught.value.held, caught.value.limit) == (2, 2, 3)
    assert str(caught.value).startswith("a pin of 2 blocks was asked for, pins hold 2 and may hold 3")
    assert pickle.loads(pickle.dumps(caught.value)).limit == 3
    cache.pins.reserve("q", 3)
    assert pin_counts(cache) == (2, 2)


def test_room_is_set_aside_before_the_prefix_is_computed():
    cache = CacheManager(10, 2, max_num_pinned=2)
    cache.pins.reserve("p", 4)
    with pytest.raises(PinLimit):
        cache.pins.reserve("q", 2)
    cache.pins.drop("p")
    cache.pins.reserve("q", 2)


def test_shared_blocks_count_for_each_pin_but_are_held_once():
    cache = CacheManager(10, 2, max_num_pinned=4)
    pin(cache, "p", [1, 2, 3, 4])
    pin(cache, "q", [1, 2, 3, 4])
    assert pin_counts(cache) == (2, 2)
    with pytest.raises(PinLimit):
        cache.pins.reserve("r", 2)
    cache.pins.drop("p")
    assert pin_counts(cache) == (1, 2)
    assert cache.num_free == 7
    cache.pins.reserve("r", 4)


def test_reset_drops_pins_those_being_computed_too():
    cache = CacheManager(10, 2, max_num_pinned=4)
    pin(cache, "p", [1, 2, 3, 4])
    cache.pins.reserve("q", 4)
    prefill(cache, "a", [5, 6, 7, 8])
    cache.reset_prefix_cache()
    assert pin_counts(cache) == (0, 0)
    with pytest.raises(UnknownPin):
        cache.pin("q", "a")  # it was computed with the old weights
    cache.free("a")
    assert cache.num_free == 9
    cache.pins.reserve("r", 8)


def test_pin_holds_what_is_cached_not_a_private_copy_of_it():
    cache = CacheManager(12, 2, max_num_pinned=4)
    for seq_id in "ab":
        cache.match(seq_id, [1, 2, 3, 4])
        cache.allocate(seq_id, 0, 4)
    for seq_id in "ab":
        cache.commit(seq_id, [1, 2, 3, 4], 4)
    cache.pins.reserve("p", 4)
    cache.pin("p", "b")  # whose own blocks are 3 and 4
    cache.free("a")
    cache.free("b")
    cache.add("big")
    cache.allocate("big", 0, 18)
    assert cache.match("c", [1, 2, 3, 4, 5]) == 4
    assert cache.block_ids("c") == ([1, 2],)


def test_pin_caches_again_what_was_evicted_since():
    cache = CacheManager(9, 2, max_num_pinned=4)
    for seq_id in "ab":
        cache.match(seq_id, [1, 2, 3, 4])
        cache.allocate(seq_id, 0, 4)
    for seq_id in "ab":
        cache.commit(seq_id, [1, 2, 3, 4], 4)
    cache.free("a")
    cache.add("big")
    cache.allocate("big", 0, 12)
    cache.pins.reserve("p", 4)
    assert cache.pin("p", "b") == 4
    cache.free("b")
    cache.free("big")
    assert cache.match("c", [1, 2, 3, 4, 5]) == 4
    assert cache.block_ids("c") == ([3, 4],)


def test_pins_of_another_salt_are_not_hit():
    cache = CacheManager(10, 2, max_num_pinned=4)
    pin(cache, "p", [1, 2, 3, 4], salt=b"one")
    assert cache.match("a", [1, 2, 3, 4, 5], b"two") == 0
    assert cache.match("b", [1, 2, 3, 4, 5], b"one") == 4


def test_what_can_not_be_pinned_is_refused():
    cache = CacheManager(10, 4, max_num_pinned=4)
    with pytest.raises(InvalidArgument, match="3 tokens, and whole blocks of 4"):
        cache.pins.reserve("p", 3)
    cache.pins.reserve("p", 4)
    with pytest.raises(DuplicatePin, match="exists already"):
        cache.pins.reserve("p", 4)
    with pytest.raises(UnknownPin, match=r"^pin 'q' does not exist"):
        cache.pins.drop("q")
    with pytest.raises(PinLimit, match="may hold 0"):
        CacheManager(10, 4, prefix_cache=False, max_num_pinned=4).pins.reserve("p", 4)
    with pytest.raises(PinLimit, match="may hold 0"):
        CacheManager(10, 4).pins.reserve("p", 4)


def test_pins_count_as_holders_of_full_blocks():
    cache = CacheManager(10, 4, max_num_pinned=4)
    pin(cache, "p", [1, 2, 3, 4, 5, 6, 7, 8])
    stats = cache.stats()
    assert (stats.num_used, stats.num_live_tokens, stats.num_table_blocks, stats.waste) == (2, 8, 2, 0.0)
    cache.match("a", [1, 2, 3, 4, 5, 6, 0])
    stats = cache.stats()
    assert (stats.num_used, stats.num_live_tokens, stats.num_shared, stats.sharing_saved) == (2, 8, 2, 0.5)
