"""The prefix cache: chained content hashes of full blocks, and the map from hash to block.

The hash of a block covers everything that its keys and values depend on:

    root_hash = H(root, salt, adapter, block_size)           root: weights, tokenizer, KV dtype
    hash[i]   = H(hash[i-1] or root_hash, tokens of block i, extra key of block i)     extra: image digest ...

H is BLAKE2b with 256 bits. Equal hashes mean equal content, so a stale or foreign hit is impossible by construction:
what changed has another hash. Numbers are little-endian and variable parts carry their length, so hashes are
the same on every machine, and no two different inputs are the same bytes.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        """Return the parent of a sequence's first block; another salt or adapter digest never shares a block."""
        parts = (b"octavo.kvcache.v1", self.root, salt, adapter, self.block_size.to_bytes(4, "little"))
        data = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return BlockHash(blake2b(data, digest_size=_DIGEST_SIZE).digest())

    def pack(self, token_ids: Sequence[int]) -> bytes:
        """Return token ids as bytes, 4 each.

        Raises:
            InvalidArgument: one that is no unsigned 32-bit integer.

        """
        try:
            return struct.pack(f"<{len(token_ids)}I", *token_ids)
        except struct.error as error:
            raise InvalidArgument(f"token_ids must be integers in [0, 2**32), got {list(token_ids)}") from error

    def block_hash(self, parent: BlockHash, token_ids: Sequence[int], extra: bytes = b"") -> BlockHash:
        """Hash a full block.

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

    def end_hash(self, parent: BlockHash, tokens: bytes) -> BlockHash:
        """Hash the packed tokens of a block that they do not fill."""
        return BlockHash(blake2b(b"octavo.kvcache.end" + parent + tokens, digest_size=_DIGEST_SIZE).digest())

    def chain(
        self, parent: BlockHash, token_ids: Sequence[int], first: int, stop: int, extra_keys: Mapping[int, bytes]
    ) -> Iterator[BlockHash]:
        """Hash the blocks [first, stop) of a sequence one after the other.

        Args:
            parent: hash of block first - 1, or the root hash.
            token_ids: tokens of the whole sequence.
            first: index of the first block.
            stop: one past the index of the last block.
            extra_keys: `extra` of block i, by i.

        Raises:
            InvalidArgument: as `block_hash` does.

        """
        size = self.block_size
        for index in range(first, stop):
            tokens = token_ids[index * size : (index + 1) * size]
            parent = self.block_hash(parent, tokens, extra_keys.get(index, b""))
            yield parent


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
        """Return the block with this content, or None."""
        return self._blocks.get(block_hash)

    def match(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Return the blocks of the longest run of hits from the start; `hashes` is read up to the first miss only."""
        block_ids = []
        for block_hash in hashes:
            block_id = self._blocks.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def match_groups(
        self, hashes: Iterable[BlockHash], windows: Sequence[int | None], block_size: int
    ) -> list[BlockHash]:
        """Return the hashes of the longest prefix that every group has as much of as it needs to go on.

        Args:
            hashes: hashes of a sequence's blocks, read up to the first miss of a group that needs all blocks.
            windows: per group the tokens that a query sees, itself included, or None for all.
            block_size: tokens per block.

        """
        full_groups = [group for group, window in enumerate(windows) if window is None]
        prefix = []
        for block_hash in hashes:
            if not all(group_hash(block_hash, group) in self._blocks for group in full_groups):
                break
            prefix.append(block_hash)
        num_blocks = -1
        while num_blocks != len(prefix):  # what one window lacks shortens the prefix for the others
            num_blocks = len(prefix)
            for group, window in enumerate(windows):
                if window is not None:
                    del prefix[self._match_window(prefix, group, window, block_size) :]
        return prefix

    def _match_window(self, hashes: Sequence[BlockHash], group: int, window: int, block_size: int) -> int:
        """Find the largest j such that all blocks that a window needs after j * block_size tokens are cached."""
        end = first = len(hashes)
        while first > num_blocks_behind(window, end * block_size, block_size):
            first -= 1
            if group_hash(hashes[first], group) not in self._blocks:
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


def group_hash(block_hash: BlockHash, group: int) -> BlockHash:
    """Make the key of a group's block: the same tokens lie in another block for each group."""
    return BlockHash(block_hash + bytes((group,))) if group else block_hash


def num_blocks_behind(window: int, num_tokens: int, block_size: int) -> int:
    """Count the leading blocks that no query at position `num_tokens` or later sees.

    The query at position p sees [p - window + 1, p].
    """
    return max(0, num_tokens - window + 1) // block_size
