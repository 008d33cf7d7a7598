"""CacheManager: gives blocks to sequences, shares them, copies them on write, caches prefixes, and counts it all."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from octavo_kvcache.allocation import UNCHANGED, Allocation
from octavo_kvcache.census import Census
from octavo_kvcache.empty_slots import EmptySlots
from octavo_kvcache.errors import DuplicateSequence, InvalidArgument, UnknownSequence
from octavo_kvcache.grower import Grower
from octavo_kvcache.host_tier import HostTier
from octavo_kvcache.lookups import Lookup
from octavo_kvcache.parked import ParkedBlocks
from octavo_kvcache.pins import Pins
from octavo_kvcache.pool import BlockPool
from octavo_kvcache.prefix_index import PrefixIndex
from octavo_kvcache.sequence import NEVER, SeqId, SequenceBlocks
from octavo_kvcache.spec import KVCacheSpec
from octavo_kvcache.stats import CacheStats, HostCounts
from octavo_kvcache.table import BlockTable

_NO_EXTRA_KEYS: Mapping[int, bytes] = MappingProxyType({})


class CacheManager:
    """The only class of this package that a scheduler calls. It holds no tensors and does no I/O.

    All groups take their blocks from one pool: a block belongs to one group at a time. Sequences that must wait can
    keep their content on the `host`, which is a HostTier, or None.

    Args:
        num_blocks: blocks in storage, null block 0 included.
        block_size: tokens per block.
        prefix_cache: keep the blocks of finished sequences and attach them to new ones with the same beginning.
        min_partial_hit: fewest tokens for which a cached block is shared, and copied, up to where the tokens differ. To
            copy a block costs less than to compute one token of it; `block_size` leaves whole blocks alone to be hit.
        deduplicate: let a block that becomes full give way to a cached one with the same content. Only where computing
            the same tokens twice gives the same bits, whatever else is in the step: the blocks change places.
        max_num_pinned: the most blocks that `pins` may hold; without a prefix cache they hold none.
        root: digest of all that cached content depends on besides tokens: weights, tokenizer, KV dtype.
        groups: one spec per group of layers with equal specs; () means one group with full attention.
        num_host_blocks: blocks in the host's memory for sequences that are swapped out, block 0 included; 0 for none.

    Raises:
        InvalidArgument: fewer than 2 blocks, 1 host block, or a block size below 1.

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
        min_partial_hit: int = 1,
        deduplicate: bool = False,
        max_num_pinned: int = 0,
        root: bytes = b"",
        groups: Sequence[KVCacheSpec] = (),
        num_host_blocks: int = 0,
    ) -> None:
        if block_size < 1 or min_partial_hit < 1:
            raise InvalidArgument(f"block_size {block_size} and min_partial_hit {min_partial_hit} must be at least 1")
        self.block_size = block_size
        self._windows = tuple(spec.window for spec in groups) or (None,)
        self._pool = BlockPool(num_blocks, on_evict=lambda *evicted: self._prefix.forget(*evicted))
        self.prefix_cache = prefix_cache
        self._prefix = PrefixIndex(
            self._pool, block_size, self._windows, root, min_partial_hit=min_partial_hit, deduplicates=deduplicate
        )
        self._sequences: dict[SeqId, SequenceBlocks] = {}
        self._empty_slots = EmptySlots(self._pool)
        self._parked = ParkedBlocks(self._pool)
        self.pins = Pins(self._pool, block_size, len(self._windows), max_num_pinned if prefix_cache else 0)
        self._census = Census(block_size, self._pool, self._parked, self.pins, self._empty_slots)
        self.host = (
            HostTier(num_host_blocks, self._pool, self._prefix, self._sequences, self._empty_slots)
            if num_host_blocks
            else None
        )
        self._grower = Grower(self._windows, self._pool, self._prefix, self._empty_slots, self._census, self.host)

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
        self._refuse_duplicate(seq_id)
        tables = tuple(BlockTable(self.block_size) for _ in self._windows)
        seq = SequenceBlocks(tables, self._prefix.root_hash(salt, adapter), extra_keys)
        if not self.prefix_cache:
            seq.next_commit = NEVER
        self._sequences[seq_id] = seq

    def match(
        self,
        seq_id: SeqId,
        token_ids: Sequence[int],
        salt: bytes = b"",
        *,
        adapter: bytes = b"",
        extra_keys: Mapping[int, bytes] = _NO_EXTRA_KEYS,
        resumed: bool = False,
    ) -> int:
        """Start a sequence with the longest cached prefix of its tokens; return the number of cached tokens.

        It leaves at least the last token to compute. What it is beyond a multiple of the block size lies in a block
        that is cached for other tokens and agrees up to there; the first write copies it. The cached blocks are held
        from now on: if the sequence can not be scheduled, `free` it and match again later. The look-up is counted in
        the statistics with the first allocation that succeeds, so trying again does not inflate them.

        Args:
            seq_id: a new id.
            token_ids: all tokens known: the prompt, or prompt and output of a preempted sequence.
            salt: as for `add`.
            adapter: as for `add`.
            extra_keys: as for `add`.
            resumed: whether the sequence was admitted before and lost its blocks; such look-ups are counted apart.

        Raises:
            DuplicateSequence: the id is in use.
            InvalidArgument: a token id that is no unsigned 32-bit integer; the sequence does not exist then.

        """
        self.add(seq_id, salt=salt, adapter=adapter, extra_keys=extra_keys)
        if not self.prefix_cache:
            return 0
        seq = self._sequences[seq_id]
        try:
            self._prefix.attach(seq, token_ids)
        except InvalidArgument:
            del self._sequences[seq_id]
            raise
        self._empty_slots.enter(seq)
        num_partial = seq.num_tokens % self.block_size
        seq.lookup = Lookup(len(token_ids), seq.num_tokens - num_partial, num_partial, resumed)
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
        self._refuse_duplicate(child_id)
        child = parent.fork(num_tokens)
        self._empty_slots.leave(parent)
        for table in child.tables:
            self._pool.retain(table.held)
        self._empty_slots.enter(parent)
        self._empty_slots.enter(child)
        self._sequences[child_id] = child

    def free(self, seq_id: SeqId, *, after: int | None = None, token_ids: Sequence[int] = ()) -> None:
        """End a sequence and release its blocks, tail first.

        Args:
            seq_id: the sequence; it may be swapped out.
            after: a step in flight that still uses the blocks: they are released when `step_done` reports it.
            token_ids: all its tokens, so that the last of them, which fill no block, can be hit too; () gives them up.

        Raises:
            UnknownSequence: there is no such sequence.
            InvalidArgument: one of the last tokens is no unsigned 32-bit integer; nothing was freed.

        """
        if self.host is not None and seq_id in self.host:
            self.host.free(seq_id)
            return
        seq = self._get(seq_id)
        if token_ids:
            self._prefix.register_end(seq, token_ids)
        self._empty_slots.leave(seq)
        del self._sequences[seq_id]
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
        return self._grower.grow(seq, num_computed_tokens, stop)

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
        return self._grower.grow_together([self._get(seq_id) for seq_id in seq_ids], num_computed_tokens)

    def can_allocate(self, seq_id: SeqId, num_computed_tokens: int, num_new_tokens: int) -> bool:
        """Say whether `allocate` with the same arguments would succeed. Changes nothing.

        Raises:
            UnknownSequence, InvalidArgument: as `allocate` does.

        """
        return self._grower.can_grow(self._get(seq_id), num_computed_tokens, num_computed_tokens + num_new_tokens)

    def commit(
        self, seq_id: SeqId, token_ids: Sequence[int], num_computed_tokens: int, *, in_flight: int | None = None
    ) -> None:
        """Declare tokens final: computed and never to be overwritten. Call it with each step's result.

        Blocks that became full can be hit from now on. If a block with the same content is cached already, ours stays
        private, or, with `deduplicate`, gives way to it: the next allocation reports the change as a `TableUpdate`, and
        steps in flight go on with ours. Costs O(new full blocks).

        Args:
            seq_id: the sequence.
            token_ids: all its tokens, at least the first `num_computed_tokens`.
            num_computed_tokens: tokens whose keys and values are computed.
            in_flight: the last step in flight that may use the sequence's blocks; None if there is none.

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
        if num_computed_tokens >= seq.next_commit:
            dropped = self._prefix.register(seq, token_ids, num_computed_tokens // self.block_size)
            self._parked.add(dropped, in_flight)
        seq.num_committed = num_computed_tokens

    def reset_prefix_cache(self, root: bytes | None = None) -> None:
        """Forget all cached content and drop all pins.

        Running sequences go on, but cache nothing more. With a `root`, as after a change of weights, what is cached
        from now on depends on it: nothing that was cached before can be hit, wherever it may be left.
        """
        self.pins.clear()
        self._prefix.clear(root)
        for seq in self._sequences.values():
            seq.next_commit = NEVER
        if self.host is not None:
            self.host.forget_hashes()

    def pin(self, pin_id: str, seq_id: SeqId) -> int:
        """Hold the committed full blocks of a sequence against eviction; return the number of their tokens.

        Room must have been set aside with `pins.reserve`. They are held until `pins.drop` or `reset_prefix_cache`,
        whatever becomes of the sequence.

        Raises:
            UnknownPin: no room was set aside, or a reset has given it up.
            UnknownSequence: there is no such sequence.

        """
        seq = self._get(seq_id)
        self.pins.hold(pin_id, self._prefix.cached_blocks(seq))
        return len(seq.hashes) * self.block_size

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
        return self._census.waste

    def stats(self) -> CacheStats:
        """Count blocks and tokens: O(parked blocks), and O(forks that share a partial block)."""
        host = HostCounts() if self.host is None else self.host.counts()
        return self._census.stats(len(self._sequences), self._prefix.num_deduplicated, host)

    def _refuse_duplicate(self, seq_id: SeqId) -> None:
        if seq_id in self._sequences or (self.host is not None and seq_id in self.host):
            raise DuplicateSequence(f"sequence {seq_id!r} exists already; free it first or take another id")

    def _get(self, seq_id: SeqId) -> SequenceBlocks:
        try:
            return self._sequences[seq_id]
        except KeyError:
            raise UnknownSequence(f"sequence {seq_id!r} does not exist: it was never added or has been freed") from None
