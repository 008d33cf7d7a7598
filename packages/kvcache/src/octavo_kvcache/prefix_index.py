"""PrefixIndex: attaches cached blocks to sequences that begin alike, and makes the blocks that they fill hittable."""

from collections.abc import Sequence

from octavo_kvcache.block import NULL_BLOCK, BlockHash
from octavo_kvcache.continuations import Continuations, PartialHit
from octavo_kvcache.pool import BlockPool
from octavo_kvcache.prefix import BlockHasher, PrefixCache, group_hash, num_blocks_behind
from octavo_kvcache.sequence import NEVER, SequenceBlocks
from octavo_kvcache.table import BlockTable


class PrefixIndex:
    """The prefix cache as sequences meet it, all groups at once. Only the `CacheManager` calls it.

    A prefix is hit block by block, and then in part: of the blocks that follow the last one hit, that whose first
    tokens agree longest is shared too, up to where it differs, and copied by the first write. A block is hit in part
    only where there is one group, with full attention (a window would have to look for such blocks behind each other),
    and if nothing but tokens goes into it (how far an image reaches is not known). So the end of a sequence, which
    fills no block, can be hit too.

    Args:
        pool: the pool of the blocks.
        block_size: tokens per block.
        windows: per group the tokens that a query sees, itself included, or None for all.
        root: digest of all that cached content depends on besides tokens: weights, tokenizer, KV dtype.
        min_partial_hit: fewest tokens for which a block is hit in part; `block_size` is never reached.
        deduplicates: whether a block that becomes full gives way to a cached one with the same content.

    Attributes:
        num_deduplicated: blocks that gave way, since the start.

    """

    __slots__ = (
        "_block_size",
        "_cache",
        "_continuations",
        "_deduplicates",
        "_hasher",
        "_min_partial_hit",
        "_pool",
        "_windows",
        "num_deduplicated",
    )

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        windows: Sequence[int | None],
        root: bytes,
        *,
        min_partial_hit: int = 1,
        deduplicates: bool = False,
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._windows = windows
        self._hasher = BlockHasher(block_size, root)
        self._cache = PrefixCache()
        self._min_partial_hit = min_partial_hit
        self._deduplicates = deduplicates
        self.num_deduplicated = 0
        hits_in_part = tuple(windows) == (None,) and min_partial_hit < block_size
        self._continuations = Continuations() if hits_in_part else None

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
        partial_hit = self._find_part(seq, hashes, token_ids)
        num_tokens = len(hashes) * self._block_size
        for group, (table, window) in enumerate(zip(seq.tables, self._windows, strict=True)):
            first = 0 if window is None else num_blocks_behind(window, num_tokens, self._block_size)
            block_ids = self._cache.match(group_hash(block_hash, group) for block_hash in hashes[first:])
            assert first + len(block_ids) == len(hashes)
            table.grow([NULL_BLOCK] * first)
            table.num_null = first
            self._share(table, block_ids, num_tokens)
        if partial_hit is not None:
            self._share(seq.tables[0], [partial_hit.block_id], partial_hit.num_tokens)
        seq.hashes = hashes
        seq.num_committed = seq.first_writable = seq.num_tokens
        seq.next_commit = num_tokens + self._block_size

    def _share(self, table: BlockTable, block_ids: list[int], num_tokens: int) -> None:
        self._pool.retain(block_ids)
        table.grow(block_ids)
        table.num_tokens += num_tokens

    def _find_part(
        self, seq: SequenceBlocks, hashes: Sequence[BlockHash], token_ids: Sequence[int]
    ) -> PartialHit | None:
        """Find the block that agrees longest with the tokens behind the blocks of these hashes."""
        parent = hashes[-1] if hashes else seq.root_hash
        if self._continuations is None or not self._continuations.follows(parent) or len(hashes) in seq.extra_keys:
            return None
        start = len(hashes) * self._block_size
        stop = min(start + self._block_size, len(token_ids) - 1)
        hit = self._continuations.longest(parent, self._hasher.pack(token_ids[start:stop]))
        return hit if hit is not None and hit.num_tokens >= self._min_partial_hit else None

    def register(self, seq: SequenceBlocks, token_ids: Sequence[int], num_blocks: int) -> list[int]:
        """Let the first `num_blocks` blocks of a sequence be hit; their tokens are final.

        Return the blocks that the sequence holds no more, since others with the same content have taken their places.

        Raises:
            InvalidArgument: a token id that is no unsigned 32-bit integer, or too few tokens.

        """
        first, size, parent = len(seq.hashes), self._block_size, seq.last_hash
        dropped: list[int] = []
        for index, block_hash in enumerate(
            self._hasher.chain(parent, token_ids, first, num_blocks, seq.extra_keys), first
        ):
            for group, table in enumerate(seq.tables):
                block_id, key = table.block_ids[index], group_hash(block_hash, group)
                if block_id == NULL_BLOCK or self._pool.block_hash(block_id) is not None:
                    continue
                if self._cache.insert(key, block_id):
                    self._pool.set_hash(block_id, key)
                    if self._continuations is not None and index not in seq.extra_keys:
                        tokens = self._hasher.pack(token_ids[index * size : (index + 1) * size])
                        self._continue(self._continuations, parent, tokens, block_id)
                elif self._deduplicates:
                    dropped.append(self._give_way(table, index, key))
            seq.hashes.append(block_hash)
            parent = block_hash
            seq.next_commit += size
            seq.first_writable = max(seq.first_writable, (index + 1) * size)
        if dropped:
            seq.writable_stop = 0  # the next allocation looks at the tables, and tells what has changed
            self.num_deduplicated += len(dropped)
        return dropped

    def register_end(self, seq: SequenceBlocks, token_ids: Sequence[int]) -> None:
        """Let the last block of a sequence that ends be hit in part: its committed tokens, which do not fill it.

        Only where nobody else has the block, and no cached one begins with the same tokens.
        """
        index, size = len(seq.hashes), self._block_size
        tokens = token_ids[index * size : seq.num_committed]
        if self._continuations is None or seq.next_commit == NEVER or index in seq.extra_keys:
            return
        if not 0 < len(tokens) < size or seq.num_committed - index * size != len(tokens):
            return
        block_id, packed = seq.tables[0].block_ids[index], self._hasher.pack(tokens)
        alone = self._pool.ref_count(block_id) == 1 and self._pool.block_hash(block_id) is None
        if alone and not self._continuations.covers(seq.last_hash, packed):
            key = self._hasher.end_hash(seq.last_hash, packed)
            self._cache.insert(key, block_id)
            self._pool.set_hash(block_id, key)
            self._continue(self._continuations, seq.last_hash, packed, block_id)

    def _continue(self, continuations: Continuations, parent: BlockHash, tokens: bytes, block_id: int) -> None:
        """Note what follows a block; an end that says less of the same, and that nobody holds, is of no more use."""
        shorter = continuations.add(parent, tokens, block_id)
        if shorter is not None and self._pool.ref_count(shorter) == 0:
            self.uncache(shorter)

    def _give_way(self, table: BlockTable, index: int, key: BlockHash) -> int:
        """Put the cached block with this key in the place of the one in the table; return that one."""
        cached = self._cache.get(key)
        assert cached is not None
        self._pool.retain([cached])
        return table.deduplicate(index, cached)

    def cached_blocks(self, seq: SequenceBlocks) -> list[int]:
        """Return the blocks under which the final full blocks of a sequence are cached, heads before tails.

        They are its own, or others with the same content; what has been evicted since is cached again.
        """
        block_ids = []
        for index, block_hash in enumerate(seq.hashes):
            for group, table in enumerate(seq.tables):
                own, key = table.block_ids[index], group_hash(block_hash, group)
                if own == NULL_BLOCK:
                    continue
                if self._cache.insert(key, own):
                    self._pool.set_hash(own, key)
                cached = self._cache.get(key)
                assert cached is not None
                block_ids.append(cached)
        return block_ids

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
        if self._continuations is not None:
            self._continuations.remove(block_id)

    def clear(self, root: bytes | None = None) -> None:
        """Take all blocks out of the cache; those that come after depend on `root`, if there is one."""
        if root is not None:
            self._hasher = BlockHasher(self._block_size, root)
        for block_id in self._cache.clear():
            self._pool.drop_hash(block_id)
        if self._continuations is not None:
            self._continuations.clear()
