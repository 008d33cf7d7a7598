import itertools
from hashlib import blake2b

import pytest

from octavo_kvcache import BlockHash, BlockHasher, InvalidArgument, PrefixCache
from octavo_kvcache.prefix import group_hash, num_blocks_behind


def hashes(*names: str) -> list[BlockHash]:
    return [BlockHash(name.encode()) for name in names]


def test_hash_is_of_the_documented_bytes():
    hasher = BlockHasher(2, root=b"weights")
    root = hasher.root_hash(salt=b"tenant", adapter=b"lora")
    parts = [b"octavo.kvcache.v1", b"weights", b"tenant", b"lora", b"\2\0\0\0"]
    data = b"".join(bytes([len(part), 0, 0, 0, 0, 0, 0, 0]) + part for part in parts)
    assert root == blake2b(data, digest_size=32).digest()
    tokens = b"\1\0\0\0" + b"\xff\xff\xff\xff"
    assert (
        hasher.block_hash(root, [1, 2**32 - 1], b"image") == blake2b(root + tokens + b"image", digest_size=32).digest()
    )


def test_every_part_changes_the_hash():
    roots = [
        BlockHasher(2).root_hash(),
        BlockHasher(3).root_hash(),
        BlockHasher(2, root=b"a").root_hash(),
        BlockHasher(2).root_hash(salt=b"a"),
        BlockHasher(2).root_hash(adapter=b"a"),
        BlockHasher(2, root=b"aa").root_hash(),
        BlockHasher(2, root=b"a").root_hash(salt=b"a"),
    ]
    hasher = BlockHasher(2)
    blocks = [
        hasher.block_hash(parent, tokens, extra)
        for parent, tokens, extra in itertools.product(roots[:2], ([1, 2], [2, 1]), (b"", b"x"))
    ]
    assert len({*roots, *blocks}) == len(roots) + len(blocks)


@pytest.mark.parametrize("tokens", [[1], [1, 2, 3], [1, -1], [1, 2**32], [1, None]], ids=str)
def test_what_is_no_full_block_of_token_ids_is_refused(tokens):
    hasher = BlockHasher(2)
    with pytest.raises(InvalidArgument, match="must be 2 integers"):
        hasher.block_hash(hasher.root_hash(), tokens)


def test_chain_goes_on_from_any_block():
    hasher, tokens, extra = BlockHasher(2), list(range(9)), {1: b"image"}
    whole = list(hasher.chain(hasher.root_hash(), tokens, 0, 4, extra))
    assert list(hasher.chain(whole[1], tokens, 2, 4, extra)) == whole[2:]
    assert len(set(whole)) == 4


def test_match_is_the_longest_run_from_the_start_and_reads_no_further():
    cache = PrefixCache()
    for block_id, block_hash in enumerate(hashes("a", "b", "d"), 5):
        assert cache.insert(block_hash, block_id)
    source = iter(hashes("a", "b", "c", "d"))
    assert cache.match(source) == [5, 6]
    assert list(source) == hashes("d")


def test_first_block_with_a_content_stays_registered():
    cache = PrefixCache()
    (key,) = hashes("a")
    assert cache.insert(key, 1)
    assert not cache.insert(key, 2)
    assert cache.insert(key, 1)
    assert (cache.get(key), len(cache)) == (1, 1)
    cache.remove(key)
    assert key not in cache
    with pytest.raises(KeyError):
        cache.remove(key)


def test_clear_returns_the_blocks():
    cache = PrefixCache()
    for block_id, block_hash in enumerate(hashes("a", "b"), 5):
        cache.insert(block_hash, block_id)
    assert cache.clear() == [5, 6]
    assert len(cache) == 0


@pytest.mark.parametrize(
    ("window", "num_tokens", "behind"),
    [(4, 3, 0), (4, 6, 0), (4, 7, 1), (4, 10, 1), (4, 11, 2), (1, 8, 2), (5, 8, 1)],
)
def test_block_is_behind_a_window_when_its_last_token_is(window, num_tokens, behind):
    assert num_blocks_behind(window, num_tokens, block_size=4) == behind
    last_seen = range(max(0, num_tokens - window + 1), num_tokens + 1)
    assert behind == sum((index + 1) * 4 <= last_seen.start for index in range(10))


@pytest.mark.parametrize(
    ("cached", "num_blocks"),  # blocks of 4, a window of 6: the query after a block sees it and the one before
    [("abcd", 4), ("abc", 3), ("cd", 4), ("bcd", 4), ("bd", 0), ("bc", 3), ("abd", 2), ("d", 0), ("", 0)],
)
def test_window_needs_only_the_last_blocks(cached, num_blocks):
    cache = PrefixCache()
    for block_id, block_hash in enumerate(hashes(*cached), 1):
        cache.insert(group_hash(block_hash, 0), block_id)
    assert len(cache.match_groups(hashes(*"abcd"), [6], 4)) == num_blocks


def test_prefix_is_as_long_as_the_poorest_group_allows():
    cache = PrefixCache()
    for group, names in enumerate(["abcde", "abe", "abcd"]):
        for block_hash in hashes(*names):
            cache.insert(group_hash(block_hash, group), 1)
    # group 0 has all five; group 1 sees one block back: "e" needs "d"; group 2 could go on after four
    assert cache.match_groups(hashes(*"abcde"), [None, 6, 6], 4) == hashes("a", "b")
