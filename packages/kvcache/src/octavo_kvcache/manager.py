"""CacheManager: gives blocks to sequences, shares them, copies them on write, caches prefixes, and counts it all."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from octavo_kvcache.allocation import UNCHANGED, Allocation
from octavo_kvcache.block import BlockHash
from octavo_kvcache.empty_slots import EmptySlots
from octavo_kvcache.errors import DuplicateSequence, InvalidArgument, UnknownSequence
from octavo_kvcache.growth import Growth, num_wanted_together, plan_growth
from octavo_kvcache.parked import ParkedBlocks
from octavo_kvcache.pool import BlockPool
from octavo_kvcache.prefix_index import PrefixIndex
from octavo_kvcache.sequence import NEVER, SequenceBlocks
from octavo_kvcache.spec import KVCacheSpec
from octavo_kvcache.stats import CacheStats
from octavo_kvcache.table import BlockTable

SeqId = int | str
"""What a caller names its sequences by."""

_NO_EXTRA_KEYS: Mapping[int, bytes] = MappingProxyType({})
_NO_HASH = BlockHash(b"")


class CacheManager:
    """The only class of this package that a scheduler calls. It holds no tensors and does no I/O.

    All groups take their blocks from one pool: a block belongs to one group at a time.

    Args:
        num_blocks: blocks in storage, null block 0 included.
        block_size: tokens per block.
        prefix_cache: keep the blocks of finished sequences and attach them to new ones with the same beginning.
        root: digest of all that cached content depends on besides tokens: weights, tokenizer, KV dtype.
        groups: one spec per group of layers with equal specs; () means one group with full attention.

    Raises:
        InvalidArgument: fewer than 2 blocks, or a block size below 1.

    Example:
        >>> cache = CacheManager(num_blocks=8, block_size=4)
        >>> cache.match("a", [1, 2, 3, 4, 5])
        0
        >>> cache.allocate("a", 0, 5).updates
        (TableUpdate(first_index=0, block_ids=(1, 2)),)
        >>> cache.commit("a", [1, 2, 3, 4, 5], 5)
        >>> cache.match("b", [1, 2, 3, 4, 9])
        4

    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_cache: bool = True,
        root: bytes = b"",
        groups: Sequence[KVCacheSpec] = (),
    ) -> None:
        if block_size < 1:
            raise InvalidArgument(f"block_size must be at least 1 token, got {block_size}")
        self.block_size = block_size
        self._windows = tuple(spec.window for spec in groups) or (None,)
        self._pool = BlockPool(num_blocks, on_evict=self._forget)
        self._prefix = PrefixIndex(self._pool, block_size, self._windows, root) if prefix_cache else None
        self._sequences: dict[SeqId, SequenceBlocks] = {}
        self._empty_slots = EmptySlots(self._pool)
        self._parked = ParkedBlocks(self._pool)
        self._num_query_tokens = 0
        self._num_hit_tokens = 0
        self._num_copies = 0

    @property
    def num_blocks(self) -> int:
        """Blocks in storage, the null block included."""
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        return self._pool.num_free

    def __contains__(self, seq_id: SeqId) -> bool:
        return seq_id in self._sequences

    # Sequences come and go

    def add(
        self,
        seq_id: SeqId,
        *,
        salt: bytes = b"",
        adapter: bytes = b"",
        extra_keys: Mapping[int, bytes] = _NO_EXTRA_KEYS,
    ) -> None:
        """Start a sequence without a look into the prefix cache, for one whose every token is to be computed.

        Args:
            seq_id: a new id.
            salt: sequences share blocks only with those of the same salt.
            adapter: digest of the adapter's content; b"" is the base model.
            extra_keys: what block i depends on besides tokens, such as the digest of an image in it, by i.

        Raises:
            DuplicateSequence: the id is in use.

        """
        if seq_id in self._sequences:
            raise DuplicateSequence(f"sequence {seq_id!r} exists already; free it first or take another id")
        tables = tuple(BlockTable(self.block_size) for _ in self._windows)
        if self._prefix is None:
            seq = SequenceBlocks(tables, _NO_HASH, extra_keys)
            seq.next_commit = NEVER
        else:
            seq = SequenceBlocks(tables, self._prefix.root_hash(salt, adapter), extra_keys)
        self._sequences[seq_id] = seq

    def match(
        self,
        seq_id: SeqId,
        token_ids: Sequence[int],
        salt: bytes = b"",
        *,
        adapter: bytes = b"",
        extra_keys: Mapping[int, bytes] = _NO_EXTRA_KEYS,
    ) -> int:
        """Start a sequence with the longest cached prefix of its tokens; return the number of cached tokens.

        The number is a multiple of the block size and leaves at least the last token to compute. The cached blocks are
        held from now on: if the sequence can not be scheduled, `free` it and match again later. The look-up is
        counted in the statistics with the first allocation that succeeds, so trying again does not inflate them.

        Args:
            seq_id: a new id.
            token_ids: all tokens known: the prompt, or prompt and output of a preempted sequence.
            salt: as for `add`.
            adapter: as for `add`.
            extra_keys: as for `add`.

        Raises:
            DuplicateSequence: the id is in use.
            InvalidArgument: a token id that is no unsigned 32-bit integer; the sequence does not exist then.

        """
        self.add(seq_id, salt=salt, adapter=adapter, extra_keys=extra_keys)
        if self._prefix is None:
            return 0
        seq = self._sequences[seq_id]
        try:
            self._prefix.attach(seq, token_ids)
        except InvalidArgument:
            del self._sequences[seq_id]
            raise
        seq.num_query_tokens = len(token_ids)
        seq.num_hit_tokens = seq.num_tokens
        return seq.num_tokens

    def fork(self, parent_id: SeqId, child_id: SeqId, *, num_tokens: int | None = None) -> None:
        """Start a sequence that shares the blocks of another, the partial last one too.

        Whoever writes to a shared block first gets a copy of it from `allocate`; the last one left writes in place.

        Args:
            parent_id: whose blocks are shared.
            child_id: a new id.
            num_tokens: share the blocks of the parent's first tokens alone, where the child goes another way; None
                shares them all.

        Raises:
            UnknownSequence: there is no parent.
            DuplicateSequence: the child's id is in use.
            InvalidArgument: the parent has fewer tokens, or they lie behind its window.

        """
        parent = self._get(parent_id)
        if child_id in self._sequences:
            raise DuplicateSequence(f"sequence {child_id!r} exists already; free it first or take another id")
        child = parent.fork(num_tokens)
        self._empty_slots.leave(parent)
        for table in child.tables:
            self._pool.retain(table.held)
        self._empty_slots.enter(parent)
        self._empty_slots.enter(child)
        self._sequences[child_id] = child

    def free(self, seq_id: SeqId, *, after: int | None = None) -> None:
        """End a sequence and release its blocks, tail first.

        Args:
            seq_id: the sequence.
            after: a step in flight that still uses the blocks: they are released when `step_done` reports it.

        Raises:
            UnknownSequence: there is no such sequence.

        """
        seq = self._get(seq_id)
        self._empty_slots.leave(seq)
        del self._sequences[seq_id]
        if after is None:
            self._pool.release(seq.held())
        else:
            self._parked.add(seq.held(), after)

    def step_done(self, step_id: int) -> None:
        """Release what was parked for this step and for all before it. Steps end in the order of their ids."""
        self._parked.step_done(step_id)

    # A sequence grows

    def allocate(self, seq_id: SeqId, num_computed_tokens: int, num_new_tokens: int) -> Allocation:
        """Make the slots of the tokens [num_computed_tokens, num_computed_tokens + num_new_tokens) writable.

        Appends blocks; replaces each shared block in this range by a fresh one, with a copy of it if it holds earlier
        tokens; replaces blocks that no later query sees by the null block. All or nothing. When only blocks that
        the sequence has for itself are written, the answer is the constant `UNCHANGED`.

        Args:
            seq_id: the sequence.
            num_computed_tokens: tokens before the first one that is written. It may be less than in the call before:
                rejected tokens are overwritten.
            num_new_tokens: tokens that the step writes.

        Raises:
            CacheFull: too few blocks are free; nothing was changed.
            UnknownSequence: there is no such sequence.
            InvalidArgument: a negative number, or tokens that would leave a gap or lie behind the window.

        """
        seq = self._sequences.get(seq_id) or self._get(seq_id)
        stop = num_computed_tokens + num_new_tokens
        tables = seq.tables
        if (
            seq.first_writable <= num_computed_tokens <= tables[0].num_tokens
            and num_computed_tokens <= stop <= seq.writable_stop
        ):
            for table in tables:  # the sequence is settled, or nothing would be writable
                self._empty_slots.num_settled += table.num_tokens - stop
                table.num_tokens = stop
            return UNCHANGED
        return self._grow(seq, plan_growth(seq, num_computed_tokens, stop, self._windows, self._pool))

    def allocate_together(self, seq_ids: Sequence[SeqId], num_computed_tokens: int) -> list[Allocation]:
        """Make the slot of one token writable in each of several sequences of one length: in all of them, or in none.

        Each allocation is what `allocate` would return, in this order.

        Args:
            seq_ids: the sequences.
            num_computed_tokens: tokens before the one that is written, in every sequence.

        Raises:
            CacheFull: too few blocks are free; nothing was changed.
            UnknownSequence, InvalidArgument: as `allocate` does.

        """
        if self._pool.num_free < len(seq_ids) * len(self._windows):  # a token takes one block at most
            stop = num_computed_tokens + 1
            sequences = (self._get(seq_id) for seq_id in seq_ids)
            growths = [plan_growth(seq, num_computed_tokens, stop, self._windows, self._pool) for seq in sequences]
            self._pool.require(num_wanted_together(growths, self._pool))
        return [self.allocate(seq_id, num_computed_tokens, 1) for seq_id in seq_ids]

    def can_allocate(self, seq_id: SeqId, num_computed_tokens: int, num_new_tokens: int) -> bool:
        """Say whether `allocate` with the same arguments would succeed. Changes nothing.

        Raises:
            UnknownSequence, InvalidArgument: as `allocate` does.

        """
        stop = num_computed_tokens + num_new_tokens
        growth = plan_growth(self._get(seq_id), num_computed_tokens, stop, self._windows, self._pool)
        return growth.num_wanted <= self._pool.num_free

    def commit(self, seq_id: SeqId, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Declare tokens final: computed and never to be overwritten. Call it with each step's result.

        Blocks that became full can be hit from now on. If a block with the same content is cached already, ours stays
        private: tables are not rewritten under a running sequence. Costs O(new full blocks).

        Args:
            seq_id: the sequence.
            token_ids: all its tokens, at least the first `num_computed_tokens`.
            num_computed_tokens: tokens whose keys and values are computed.

        Raises:
            UnknownSequence: there is no such sequence.
            InvalidArgument: more tokens than were allocated or given, or an id that is no unsigned 32-bit integer.

        """
        seq = self._sequences.get(seq_id) or self._get(seq_id)
        if num_computed_tokens > seq.tables[0].num_tokens:
            raise InvalidArgument(
                f"num_computed_tokens {num_computed_tokens} is more than the {seq.num_tokens} tokens allocated "
                f"for sequence {seq_id!r}; allocate before commit"
            )
        if num_computed_tokens >= seq.next_commit and self._prefix is not None:
            self._prefix.register(seq, token_ids, num_computed_tokens // self.block_size)
        seq.num_committed = num_computed_tokens

    def reset_prefix_cache(self) -> None:
        """Forget all cached content, as after a change of weights. Running sequences go on, but cache nothing more."""
        if self._prefix is None:
            return
        self._prefix.clear()
        for seq in self._sequences.values():
            seq.next_commit = NEVER

    # What there is

    def block_ids(self, seq_id: SeqId) -> tuple[list[int], ...]:
        """Return the block table of a sequence, one list per group; the lists are copies.

        Raises:
            UnknownSequence: there is no such sequence.

        """
        return tuple(table.block_ids.copy() for table in self._get(seq_id).tables)

    def num_committed(self, seq_id: SeqId) -> int:
        """Return how many of a sequence's tokens have been declared final by `commit`, or were cached or shared so.

        Raises:
            UnknownSequence: there is no such sequence.

        """
        return self._get(seq_id).num_committed

    @property
    def waste(self) -> float:
        """`stats().waste`, cheap enough for every step: O(parked blocks) while no forks share a partial block."""
        num_used = self._pool.num_used
        if not num_used:
            return 0.0
        return 1 - self._num_live_tokens() / (num_used * self.block_size)

    def stats(self) -> CacheStats:
        """Count blocks and tokens: O(parked blocks), and O(forks that share a partial block)."""
        pool, parked = self._pool, self._parked
        return CacheStats(
            num_blocks=pool.num_blocks,
            block_size=self.block_size,
            num_sequences=len(self._sequences),
            num_free=pool.num_free,
            num_used=pool.num_used,
            num_cached=pool.num_cached,
            num_shared=pool.num_shared,
            num_parked=parked.num_blocks,
            num_table_blocks=pool.num_refs - parked.refs.total(),
            num_live_tokens=self._num_live_tokens(),
            num_query_tokens=self._num_query_tokens,
            num_hit_tokens=self._num_hit_tokens,
            num_copies=self._num_copies,
            num_evictions=pool.num_evictions,
        )

    def _num_live_tokens(self) -> int:
        num_unique = self._pool.num_used - self._parked.num_blocks
        return num_unique * self.block_size - self._empty_slots.count(self._parked.refs)

    def _get(self, seq_id: SeqId) -> SequenceBlocks:
        try:
            return self._sequences[seq_id]
        except KeyError:
            raise UnknownSequence(f"sequence {seq_id!r} does not exist: it was never added or has been freed") from None

    def _grow(self, seq: SequenceBlocks, growth: Growth) -> Allocation:
        self._pool.require(growth.num_wanted)
        self._empty_slots.leave(seq)
        copies, updates = growth.apply(self._pool)
        for group in growth.groups:
            for block_id in group.cached:
                self._uncache(block_id)
        seq.rewind(growth.start)
        seq.first_writable = growth.first_block * self.block_size
        # A sequence that is not settled is looked at in full each time it grows.
        seq.writable_stop = growth.end_block * self.block_size if self._empty_slots.enter(seq) else 0
        self._num_copies += len(copies)
        self._num_query_tokens += seq.num_query_tokens
        self._num_hit_tokens += seq.num_hit_tokens
        seq.num_query_tokens = seq.num_hit_tokens = 0
        if not any(update.block_ids for update in updates):
            return UNCHANGED
        return Allocation(tuple(copies), tuple(updates))

    def _uncache(self, block_id: int) -> None:
        assert self._prefix is not None, "only a prefix cache gives blocks a hash"
        self._prefix.uncache(block_id)

    def _forget(self, block_hash: BlockHash, block_id: int) -> None:
        assert self._prefix is not None, "only a prefix cache gives blocks a hash"
        self._prefix.forget(block_hash, block_id)
