import pytest

from octavo_kvcache import BlockHash, BlockPool, CacheFull, InvalidArgument, InvalidBlock


def digest(name: str) -> BlockHash:
    return BlockHash(name.encode())


def test_allocates_ascending_ids_and_never_the_null_block():
    pool = BlockPool(5)
    assert pool.allocate(4) == [1, 2, 3, 4]
    assert (pool.num_free, pool.num_used, pool.num_usable) == (0, 4, 4)


def test_full_pool_raises_with_numbers_and_takes_nothing():
    pool = BlockPool(5)
    pool.allocate(3)
    with pytest.raises(CacheFull, match="2 blocks wanted, 1 of 4 are free") as caught:
        pool.allocate(2)
    assert (caught.value.wanted, caught.value.free, caught.value.total) == (2, 1, 4)
    assert pool.allocate(1) == [4]


def test_block_without_hash_is_used_again_before_an_untouched_one():
    pool = BlockPool(10)
    pool.release(pool.allocate(3))
    assert pool.free_block_ids() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert pool.allocate(4) == [1, 2, 3, 4]


def test_cached_blocks_are_evicted_last_and_tail_first():
    evicted = []
    pool = BlockPool(6, on_evict=lambda block_hash, block_id: evicted.append((block_hash, block_id)))
    block_ids = pool.allocate(3)
    for block_id in block_ids:
        pool.set_hash(block_id, digest(f"h{block_id}"))
    pool.release(block_ids)
    assert pool.free_block_ids() == [4, 5, 3, 2, 1]
    assert pool.num_cached == 3
    assert pool.allocate(4) == [4, 5, 3, 2]
    assert evicted == [(b"h3", 3), (b"h2", 2)]
    assert (pool.num_cached, pool.num_evictions) == (1, 2)
    assert pool.block_hash(3) is None


def test_retained_cached_block_leaves_the_free_list_from_its_middle():
    pool = BlockPool(4)
    for block_id in pool.allocate(3):
        pool.set_hash(block_id, digest(f"h{block_id}"))
    pool.release([1, 2, 3])
    pool.retain([2])
    assert pool.free_block_ids() == [3, 1]
    assert (pool.num_cached, pool.num_used) == (2, 1)
    pool.release([2])
    assert pool.free_block_ids() == [3, 1, 2]  # now the most recently used


def test_block_is_free_when_its_last_holder_releases_it():
    pool = BlockPool(3)
    pool.allocate(2)
    pool.retain([1, 2])
    pool.retain([1])
    assert (pool.num_shared, pool.num_refs) == (2, 5)
    pool.release([1, 2])
    assert (pool.num_shared, pool.num_free) == (1, 0)
    pool.release([1, 2])
    assert (pool.num_shared, pool.num_refs, pool.num_free) == (0, 1, 1)
    pool.release([1])
    assert pool.num_free == 2


def test_block_that_lost_its_hash_is_used_first():
    pool = BlockPool(4)
    for block_id in pool.allocate(2):
        pool.set_hash(block_id, digest(f"h{block_id}"))
    pool.release([1, 2])
    assert pool.free_block_ids() == [3, 2, 1]
    pool.drop_hash(1)
    assert pool.free_block_ids() == [1, 3, 2]
    assert pool.num_cached == 1
    pool.drop_hash(1)
    assert pool.num_cached == 1


@pytest.mark.parametrize("block_id", [0, 2], ids=["null block", "free block"])
def test_block_that_nobody_holds_can_not_be_held_or_hashed(block_id):
    pool = BlockPool(3)
    pool.allocate(1)
    for call in (lambda: pool.retain([block_id]), lambda: pool.release([block_id])):
        with pytest.raises(InvalidBlock, match=f"block {block_id} can not be"):
            call()
    with pytest.raises(InvalidBlock, match="nobody holds it"):
        pool.set_hash(block_id, digest("h"))


def test_pool_needs_a_block_besides_the_null_block():
    with pytest.raises(InvalidArgument, match="num_blocks must be at least 2"):
        BlockPool(1)


def test_a_block_that_is_handed_out_again_has_no_twin():
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.set_twin(first, 7)
    pool.set_twin(second, 8)
    pool.release([first])
    assert (pool.twin(first), pool.twin(second)) == (7, 8)
    assert pool.allocate(1) == [first]
    assert (pool.twin(first), pool.twin(second)) == (None, 8)
