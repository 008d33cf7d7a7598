"""The prefix cache: chained content hashes of full blocks, and the map from hash to block.

The hash of a block covers everything that its keys and values depend on:

    root_hash = H(root, salt, adapter, block_size)           root: weights, tokenizer, KV dtype
    hash[i]   = H(hash[i-1] or root_hash, tokens of block i, extra key of block i)     extra: image digest ...

H is BLAKE2b with 256 bits. Equal hashes mean equal content, so a stale or foreign hit is impossible by construction:
what changed has another hash. Numbers are little-endian and variable parts carry their length, so hashes are
the same on every machine, and no two different inputs are the same bytes.
"""

import struct
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from octavo_kvcache.block import BlockHash
from octavo_kvcache.errors import InvalidArgument

_DIGEST_SIZE = 32


class BlockHasher:
    """Hashes the blocks of one cache.

    Args:
        block_size: tokens per block.
        root: digest of all that the whole cache depends on: weights, tokenizer, KV dtype.
    """

    def __init__(self, block_size: int, root: bytes = b"") -> None:
        self.block_size = block_size
        self.root = root
        self._tokens = struct.Struct(f"<{block_size}I")

    def root_hash(self, salt: bytes = b"", adapter: bytes = b"") -> BlockHash:
        """The parent of a sequence's first block: sequences with another salt or adapter digest never share."""
        parts = (b"octavo.kvcache.v1", self.root, salt, adapter, self.block_size.to_bytes(4, "little"))
        data = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return BlockHash(blake2b(data, digest_size=_DIGEST_SIZE).digest())

    def block_hash(self, parent: BlockHash, token_ids: Sequence[int], extra: bytes = b"") -> BlockHash:
        """The hash of a full block.

        Args:
            parent: hash of the block before it, or the root hash.
            token_ids: exactly `block_size` token ids.
            extra: what else the block's content depends on, such as the digest of an image in it.

        Raises:
            InvalidArgument: another number of tokens, or one that is no unsigned 32-bit integer.
        """
        try:
            tokens = self._tokens.pack(*token_ids)
        except struct.error as error:
            raise InvalidArgument(
                f"token_ids of a full block must be {self.block_size} integers in [0, 2**32), got {list(token_ids)}; "
                "placeholders can not be committed"
            ) from error
        # parent and tokens have a fixed length, so what follows them needs no length of its own
        return BlockHash(blake2b(parent + tokens + extra, digest_size=_DIGEST_SIZE).digest())


class PrefixCache:
    """Which block holds the content with a given hash. The blocks may be held by sequences or wait in the free list."""

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        self._blocks: dict[BlockHash, int] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._blocks

    def get(self, block_hash: BlockHash) -> int | None:
        """The block with this content, or None."""
        return self._blocks.get(block_hash)

    def match(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The blocks of the longest run of hits from the start; `hashes` is read up to the first miss only."""
        block_ids = []
        for block_hash in hashes:
            block_id = self._blocks.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def match_window(self, hashes: Sequence[BlockHash], window: int, block_size: int) -> int:
        """The largest number of blocks j such that the blocks a window needs after j * block_size tokens are cached.

        Args:
            hashes: hashes of the prefix, one per block.
            window: tokens that a query sees, itself included.
            block_size: tokens per block.
        """
        end = first = len(hashes)
        while first > num_blocks_behind(window, end * block_size, block_size):
            first -= 1
            if hashes[first] not in self._blocks:
                end = first
        return end

    def insert(self, block_hash: BlockHash, block_id: int) -> bool:
        """Register a block unless its content is cached already; say whether it was registered."""
        return self._blocks.setdefault(block_hash, block_id) == block_id

    def remove(self, block_hash: BlockHash) -> None:
        """Forget one entry.

        Raises:
            KeyError: it is not there.
        """
        del self._blocks[block_hash]

    def clear(self) -> list[int]:
        """Forget everything; return the blocks that were registered, oldest entry first."""
        block_ids = list(self._blocks.values())
        self._blocks.clear()
        return block_ids


def num_blocks_behind(window: int, num_tokens: int, block_size: int) -> int:
    """How many leading blocks no query at position `num_tokens` or later sees through a window.

    The query at position p sees [p - window + 1, p].
    """
    return max(0, num_tokens - window + 1) // block_size
