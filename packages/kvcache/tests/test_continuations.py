import random
import struct

from octavo_kvcache import BlockHash
from octavo_kvcache.continuations import Continuations, PartialHit

ROOT, OTHER = BlockHash(b"root"), BlockHash(b"other")


def packed(*tokens: int) -> bytes:
    return struct.pack(f"<{len(tokens)}I", *tokens)


def test_longest_agreement_is_found_among_neighbours():
    cached = Continuations()
    for block_id, tokens in enumerate([(1, 2, 3, 4), (1, 2, 9, 9), (1, 5, 5, 5), (7, 7, 7, 7)], 1):
        cached.add(ROOT, packed(*tokens), block_id)
    assert cached.longest(ROOT, packed(1, 2, 9, 8)) == PartialHit(2, 3)
    assert cached.longest(ROOT, packed(1, 5)) == PartialHit(3, 2)
    assert cached.longest(ROOT, packed(8, 1)) == PartialHit(4, 0)
    assert cached.longest(ROOT, b"").num_tokens == 0
    assert cached.longest(OTHER, packed(1, 2)) is None


def test_tokens_that_share_bytes_do_not_agree():
    cached = Continuations()
    cached.add(ROOT, packed(0x01020304, 5), 1)
    assert cached.longest(ROOT, packed(0x01020305, 5)) == PartialHit(1, 0)
    assert cached.longest(ROOT, packed(0xFF020304, 5)) == PartialHit(1, 0)


def test_what_is_removed_is_found_no_more():
    cached = Continuations()
    cached.add(ROOT, packed(1, 2), 1)
    cached.add(ROOT, packed(1, 3), 2)
    cached.remove(1)
    cached.remove(1)
    cached.remove(99)
    assert cached.longest(ROOT, packed(1, 2)) == PartialHit(2, 1)
    cached.remove(2)
    assert not cached.follows(ROOT)
    assert len(cached) == 0


def test_any_set_of_blocks_answers_like_comparing_with_all():
    rng = random.Random(0)
    for _ in range(200):
        cached, blocks = Continuations(), {}
        for block_id in range(1, rng.randint(2, 30)):
            tokens = tuple(rng.choice([0, 1, 256, 2**32 - 1]) for _ in range(4))
            if tokens not in blocks.values():
                blocks[block_id] = tokens
                cached.add(ROOT, packed(*tokens), block_id)
        for block_id in [b for b in blocks if rng.random() < 0.3]:
            del blocks[block_id]
            cached.remove(block_id)
        query = [rng.choice([0, 1, 256, 2**32 - 1]) for _ in range(rng.randint(0, 4))]
        agreeing = [
            next((i for i, (a, b) in enumerate(zip(tokens, query, strict=False)) if a != b), len(query))
            for tokens in blocks.values()
        ]
        hit = cached.longest(ROOT, packed(*query))
        assert (hit.num_tokens if hit else None) == max(agreeing, default=None)
        if hit:
            assert list(blocks[hit.block_id][: hit.num_tokens]) == query[: hit.num_tokens]
