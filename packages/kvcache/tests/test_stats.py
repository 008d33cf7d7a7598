import pytest

from octavo_kvcache import CacheManager


def filled(num_tokens: int, *, num_blocks: int = 50, block_size: int = 16) -> CacheManager:
    cache = CacheManager(num_blocks, block_size)
    cache.add("a")
    cache.allocate("a", 0, num_tokens)
    return cache


def test_empty_cache_wastes_and_saves_nothing():
    stats = CacheManager(50, 16).stats()
    assert (stats.waste, stats.sharing_saved, stats.usage, stats.hit_rate) == (0.0, 0.0, 0.0, 0.0)
    assert (stats.num_usable, stats.num_free, stats.num_used) == (49, 49, 0)


@pytest.mark.parametrize(("num_tokens", "waste"), [(16, 0.0), (17, 15 / 32), (1, 15 / 16), (300, 4 / 304)])
def test_waste_is_the_empty_share_of_held_blocks(num_tokens, waste):
    stats = filled(num_tokens).stats()
    assert stats.num_live_tokens == num_tokens
    assert stats.waste == pytest.approx(waste)


def test_blocks_past_the_scheduled_tokens_are_waste():
    cache = filled(30)
    cache.allocate("a", 30, 8)  # a draft of 8 tokens, all rejected
    cache.allocate("a", 30, 1)
    stats = cache.stats()
    assert (stats.num_used, stats.num_live_tokens) == (3, 31)
    assert stats.waste == 1 - 31 / 48


def test_shared_tokens_count_once():
    cache = filled(300)
    for child in "bcd":
        cache.fork("a", child)
    stats = cache.stats()
    assert (stats.num_used, stats.num_live_tokens, stats.num_table_blocks) == (19, 300, 76)
    assert stats.waste == 1 - 300 / 304
    assert stats.sharing_saved == 1 - 19 / 76
    for seq_id in "abcd":
        cache.allocate(seq_id, 300, 1)
    stats = cache.stats()
    assert (stats.num_used, stats.num_live_tokens) == (22, 288 + 4 * 13)
    assert stats.waste == pytest.approx(1 - 340 / 352)
    assert stats.sharing_saved == pytest.approx(1 - 22 / 76)


def test_shared_block_is_as_full_as_the_longest_of_its_sequences_says():
    cache = filled(20)
    cache.fork("a", "b")
    cache.allocate("b", 18, 0)  # b takes two tokens back: block 2 is as full as a says
    assert cache.stats().num_live_tokens == 20
    cache.allocate("b", 10, 0)  # block 2 has no token of b, and is still a's
    assert cache.stats().num_live_tokens == 20
    cache.free("a")
    assert cache.stats().num_live_tokens == 10
    cache.free("b")
    assert cache.stats().num_live_tokens == 0


def test_cached_blocks_are_reported_apart_and_are_no_waste():
    cache = filled(40)
    cache.commit("a", list(range(40)), 40)
    cache.free("a")
    stats = cache.stats()
    assert (stats.num_cached, stats.num_used, stats.num_free, stats.waste) == (2, 0, 49, 0.0)


def test_parked_blocks_are_held_without_live_tokens():
    cache = filled(32)
    cache.add("b")
    cache.allocate("b", 0, 16)
    cache.fork("a", "c")
    cache.free("a", after=1)
    cache.free("b", after=1)
    stats = cache.stats()
    assert (stats.num_used, stats.num_parked, stats.num_live_tokens, stats.num_table_blocks) == (3, 1, 32, 2)
    assert stats.waste == 1 - 32 / 48
    assert stats.sharing_saved == 0.0  # a sequence in flight is no second user of c's blocks
    assert stats.usage == 3 / 49


def test_end_shared_with_a_step_in_flight_is_as_full_as_its_sequence():
    cache = filled(18)
    cache.fork("a", "b")
    cache.free("a", after=1)
    stats = cache.stats()
    assert (stats.num_used, stats.num_shared, stats.num_parked, stats.num_live_tokens) == (2, 2, 0, 18)


def test_end_taken_back_is_empty_until_another_sequence_hits_it():
    cache = filled(48)
    cache.commit("a", list(range(48)), 48)
    cache.allocate("a", 0, 1)  # blocks 2 and 3 are empty ends of a, and can still be hit
    assert (cache.stats().num_live_tokens, cache.waste) == (1, 1 - 1 / 48)
    assert cache.match("b", [*range(48), 7]) == 48  # a writes into a block of its own
    assert (cache.stats().num_used, cache.stats().num_live_tokens) == (4, 49)
    cache.free("b")
    assert cache.stats().num_live_tokens == 1
