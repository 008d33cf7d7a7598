"""Continuations: which cached blocks follow a given prefix, and which of them begins most like what is looked for."""

from bisect import bisect_left
from operator import itemgetter
from typing import NamedTuple

from octavo_kvcache.block import BlockHash

TOKEN_BYTES = 4
"""Bytes of a packed token id."""

_tokens_of = itemgetter(0)


class PartialHit(NamedTuple):
    """A cached block that begins with the first `num_tokens` of the tokens looked for."""

    block_id: int
    num_tokens: int


class Continuations:
    """Cached blocks by the block before them, their tokens in order. Only the `PrefixIndex` writes it.

    Of token strings in order, the neighbours of the place where another would stand agree longest with it, so a
    look-up compares O(log n) strings of the n blocks that follow the same prefix, and none where nothing follows it.
    """

    __slots__ = ("_following", "_places")

    def __init__(self) -> None:
        self._following: dict[BlockHash, list[tuple[bytes, int]]] = {}  # by parent: (packed tokens, block id), sorted
        self._places: dict[int, tuple[BlockHash, bytes]] = {}  # by block id: parent, packed tokens

    def __len__(self) -> int:
        return len(self._places)

    def follows(self, parent: BlockHash) -> bool:
        """Say whether any block follows the one with this hash."""
        return parent in self._following

    def add(self, parent: BlockHash, tokens: bytes, block_id: int) -> int | None:
        """Note that a block with these packed tokens, of which there is no other, follows the one with hash `parent`.

        Return the block before it in the order if that holds nothing else, only less of it.
        """
        following = self._following.setdefault(parent, [])
        place = bisect_left(following, tokens, key=_tokens_of)
        following.insert(place, (tokens, block_id))
        self._places[block_id] = parent, tokens
        shorter, shorter_id = following[place - 1]
        return shorter_id if place and tokens.startswith(shorter) else None

    def covers(self, parent: BlockHash, tokens: bytes) -> bool:
        """Say whether a block after `parent` begins with all these tokens."""
        following = self._following.get(parent, [])
        place = bisect_left(following, tokens, key=_tokens_of)
        return place < len(following) and following[place][0].startswith(tokens)

    def remove(self, block_id: int) -> None:
        """Forget a block; one that is not there is ignored."""
        place = self._places.pop(block_id, None)
        if place is None:
            return
        parent, tokens = place
        following = self._following[parent]
        del following[bisect_left(following, tokens, key=_tokens_of)]
        if not following:
            del self._following[parent]

    def longest(self, parent: BlockHash, tokens: bytes) -> PartialHit | None:
        """Return the block after `parent` that agrees longest with packed tokens from the start; None without any."""
        following = self._following.get(parent)
        if following is None:
            return None
        place = bisect_left(following, tokens, key=_tokens_of)
        hits = [
            PartialHit(block_id, _num_common(own, tokens)) for own, block_id in following[max(place - 1, 0) : place + 1]
        ]
        return max(hits, key=lambda hit: hit.num_tokens)

    def clear(self) -> None:
        """Forget everything."""
        self._following.clear()
        self._places.clear()


def _num_common(one: bytes, other: bytes) -> int:
    """Count the tokens with which both begin."""
    num_bytes = min(len(one), len(other))
    difference = int.from_bytes(one[:num_bytes], "big") ^ int.from_bytes(other[:num_bytes], "big")
    return (8 * num_bytes - difference.bit_length()) // (8 * TOKEN_BYTES)
