"""Full blocks that give way to cached ones with the same content."""

import pytest

from octavo_kvcache import UNCHANGED, Allocation, CacheManager, KVCacheSpec, TableUpdate


def compute_at_once(cache: CacheManager, *seq_ids: str, token_ids: list[int], in_flight: int | None = None) -> None:
    """Compute one prompt for several sequences in one step."""
    for seq_id in seq_ids:
        cache.match(seq_id, token_ids)
        cache.allocate(seq_id, 0, len(token_ids))
    for seq_id in seq_ids:
        cache.commit(seq_id, token_ids, len(token_ids), in_flight=in_flight)


def make(num_blocks: int = 20, block_size: int = 2, **options: object) -> CacheManager:
    return CacheManager(num_blocks, block_size, deduplicate=True, **options)


def test_identical_blocks_are_held_once_and_the_next_update_says_so():
    cache = make()
    compute_at_once(cache, "a", "b", token_ids=[1, 2, 3, 4, 5])
    assert cache.block_ids("a") == ([1, 2, 3],)
    assert cache.block_ids("b") == ([1, 2, 6],)
    assert cache.allocate("a", 5, 1) is UNCHANGED
    assert cache.allocate("b", 5, 1) == Allocation((), (TableUpdate(0, (1, 2)),))
    assert cache.allocate("b", 6, 1) == Allocation((), (TableUpdate(3, (4,)),))
    stats = cache.stats()
    assert (stats.num_deduplicated, stats.num_shared, stats.num_used) == (2, 2, 5)


def test_update_covers_what_changed_before_and_what_is_new():
    cache = make()
    compute_at_once(cache, "a", "b", token_ids=[1, 2, 3, 4])
    assert cache.allocate("b", 4, 1) == Allocation((), (TableUpdate(0, (1, 2, 3)),))


def test_blocks_that_gave_way_are_free_after_the_steps_in_flight():
    cache = make()
    compute_at_once(cache, "a", "b", token_ids=[1, 2, 3, 4], in_flight=7)
    assert cache.block_ids("b") == ([1, 2],)
    stats = cache.stats()
    assert (stats.num_used, stats.num_parked, stats.num_live_tokens) == (4, 2, 4)
    cache.step_done(6)
    assert cache.stats().num_parked == 2
    cache.step_done(7)
    assert (cache.stats().num_used, cache.stats().num_parked) == (2, 0)
    cache.add("c")
    assert cache.allocate("c", 0, 4).updates[0].block_ids == (3, 4)


def test_cached_block_that_nobody_holds_is_taken_too():
    cache = make()
    cache.add("a")  # computes all its tokens, whatever is cached
    compute_at_once(cache, "b", token_ids=[1, 2, 3])
    cache.free("b")
    cache.allocate("a", 0, 3)
    cache.commit("a", [1, 2, 3], 3)
    assert cache.block_ids("a") == ([1, 3],)
    assert cache.stats().num_cached == 0


def test_forks_give_way_one_by_one_and_the_block_is_free_when_all_have():
    cache = make()
    compute_at_once(cache, "first", token_ids=[1, 2, 3, 4, 5])
    cache.add("a")
    cache.allocate("a", 0, 5)
    cache.fork("a", "b")
    cache.commit("a", [1, 2, 3, 4, 5], 5)
    assert cache.block_ids("a") == ([1, 2, 6],)
    assert cache.block_ids("b") == ([4, 5, 6],)
    cache.commit("b", [1, 2, 3, 4, 5], 5)
    assert cache.block_ids("b") == ([1, 2, 6],)
    assert cache.stats().num_used == 4
    assert cache.allocate("a", 5, 1).updates == (TableUpdate(0, (1, 2, 4)),)
    assert cache.allocate("b", 5, 1).updates == (TableUpdate(0, (1, 2)),)


def test_fork_inherits_what_the_runner_does_not_know_yet():
    cache = make()
    compute_at_once(cache, "a", "b", token_ids=[1, 2, 3, 4, 5])
    cache.fork("b", "c")
    cache.fork("b", "short", num_tokens=2)
    assert cache.allocate("b", 5, 1).updates == (TableUpdate(0, (1, 2, 4)),)
    assert cache.allocate("c", 5, 1).updates == (TableUpdate(0, (1, 2)),)
    assert cache.allocate("short", 2, 1).updates == (TableUpdate(0, (1, 5)),)


def test_other_salts_and_switched_off_caches_keep_their_blocks():
    cache = make()
    for salt in (b"one", b"two"):
        cache.match(salt.decode(), [1, 2, 3], salt)
        cache.allocate(salt.decode(), 0, 3)
    for name in ("one", "two"):
        cache.commit(name, [1, 2, 3], 3)
    assert cache.block_ids("two") == ([3, 4],)
    cache = make(prefix_cache=False)
    compute_at_once(cache, "a", "b", token_ids=[1, 2, 3])
    assert cache.block_ids("b") == ([3, 4],)


def test_every_group_gives_way_by_itself():
    full, window = KVCacheSpec(1, 8), KVCacheSpec(1, 8, kind="window", window=3)
    cache = make(groups=[full, window])
    compute_at_once(cache, "a", "b", token_ids=[1, 2, 3, 4, 5])
    assert cache.block_ids("a") == ([1, 2, 3], [4, 5, 6])
    assert cache.block_ids("b") == ([1, 2, 9], [4, 5, 12])
    assert cache.allocate("b", 5, 2).updates == (TableUpdate(0, (1, 2, 9, 7)), TableUpdate(0, (0, 5, 12, 10)))


def test_tokens_taken_back_into_a_block_taken_over_are_written_elsewhere():
    cache = make()
    compute_at_once(cache, "a", "b", token_ids=[1, 2, 3, 4])
    allocation = cache.allocate("b", 3, 1)
    assert [(copy.src, copy.dst) for copy in allocation.copies] == [(2, 3)]
    assert allocation.updates == (TableUpdate(0, (1, 3)),)


@pytest.mark.parametrize("num_tokens", [3, 4], ids=["to spare", "full"])
def test_waste_and_live_tokens_stay_exact(num_tokens):
    cache = make()
    compute_at_once(cache, "a", "b", token_ids=[1, 2, 3, 4][:num_tokens])
    stats = cache.stats()
    own = num_tokens % 2
    assert stats.num_live_tokens == num_tokens - own + 2 * own
    assert stats.num_used == num_tokens // 2 + 2 * own
