"""PrefixIndex: attaches cached blocks to sequences that begin alike, and makes the blocks that they fill hittable."""

from collections.abc import Sequence

from octavo_kvcache.block import NULL_BLOCK, BlockHash
from octavo_kvcache.pool import BlockPool
from octavo_kvcache.prefix import BlockHasher, PrefixCache, group_hash, num_blocks_behind
from octavo_kvcache.sequence import SequenceBlocks


class PrefixIndex:
    """The prefix cache as sequences meet it, all groups at once. Only the `CacheManager` calls it.

    Args:
        pool: the pool of the blocks.
        block_size: tokens per block.
        windows: per group the tokens that a query sees, itself included, or None for all.
        root: digest of all that cached content depends on besides tokens: weights, tokenizer, KV dtype.

    """

    __slots__ = ("_block_size", "_cache", "_hasher", "_pool", "_windows")

    def __init__(self, pool: BlockPool, block_size: int, windows: Sequence[int | None], root: bytes) -> None:
        self._pool = pool
        self._block_size = block_size
        self._windows = windows
        self._hasher = BlockHasher(block_size, root)
        self._cache = PrefixCache()

    def __len__(self) -> int:
        return len(self._cache)

    def get(self, block_hash: BlockHash) -> int | None:
        """Return the block that holds the content with this hash, or None."""
        return self._cache.get(block_hash)

    def root_hash(self, salt: bytes, adapter: bytes) -> BlockHash:
        """Return the parent of a sequence's first block."""
        return self._hasher.root_hash(salt, adapter)

    def attach(self, seq: SequenceBlocks, token_ids: Sequence[int]) -> None:
        """Let a new sequence hold the longest cached prefix of its tokens; at least the last is left to compute.

        Raises:
            InvalidArgument: a token id that is no unsigned 32-bit integer; nothing is held then.

        """
        num_blocks = (len(token_ids) - 1) // self._block_size
        chain = self._hasher.chain(seq.root_hash, token_ids, 0, num_blocks, seq.extra_keys)
        hashes = self._cache.match_groups(chain, self._windows, self._block_size)
        num_tokens = len(hashes) * self._block_size
        for group, (table, window) in enumerate(zip(seq.tables, self._windows, strict=True)):
            first = 0 if window is None else num_blocks_behind(window, num_tokens, self._block_size)
            block_ids = self._cache.match(group_hash(block_hash, group) for block_hash in hashes[first:])
            assert first + len(block_ids) == len(hashes)
            self._pool.retain(block_ids)
            table.grow([NULL_BLOCK] * first)
            table.grow(block_ids)
            table.num_null = first
            table.num_tokens = num_tokens
        seq.hashes = hashes
        seq.num_committed = seq.first_writable = num_tokens
        seq.next_commit = num_tokens + self._block_size

    def register(self, seq: SequenceBlocks, token_ids: Sequence[int], num_blocks: int) -> None:
        """Let the first `num_blocks` blocks of a sequence be hit; their tokens are final.

        Raises:
            InvalidArgument: a token id that is no unsigned 32-bit integer, or too few tokens.

        """
        pool, first = self._pool, len(seq.hashes)
        parent = seq.hashes[-1] if seq.hashes else seq.root_hash
        hashes = self._hasher.chain(parent, token_ids, first, num_blocks, seq.extra_keys)
        for index, block_hash in enumerate(hashes, first):
            for group, table in enumerate(seq.tables):
                block_id, key = table.block_ids[index], group_hash(block_hash, group)
                if block_id != NULL_BLOCK and pool.block_hash(block_id) is None and self._cache.insert(key, block_id):
                    pool.set_hash(block_id, key)
            seq.hashes.append(block_hash)
            seq.next_commit += self._block_size
            seq.first_writable = max(seq.first_writable, (index + 1) * self._block_size)

    def uncache(self, block_id: int) -> None:
        """Take a block that is about to be overwritten out of the cache."""
        block_hash = self._pool.block_hash(block_id)
        assert block_hash is not None
        self.forget(block_hash, block_id)
        self._pool.drop_hash(block_id)

    def forget(self, block_hash: BlockHash, block_id: int) -> None:
        """Forget a block that has lost its hash, or is about to."""
        assert self._cache.get(block_hash) == block_id
        self._cache.remove(block_hash)

    def clear(self) -> None:
        """Take all blocks out of the cache."""
        for block_id in self._cache.clear():
            self._pool.drop_hash(block_id)
