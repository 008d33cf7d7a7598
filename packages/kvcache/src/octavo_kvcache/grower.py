"""Grower: makes slots of sequences writable, and keeps what depends on that in step."""

from collections.abc import Sequence

from octavo_kvcache.allocation import UNCHANGED, Allocation
from octavo_kvcache.census import Census
from octavo_kvcache.empty_slots import EmptySlots
from octavo_kvcache.growth import Growth, num_wanted_together, plan_growth
from octavo_kvcache.host_tier import HostTier
from octavo_kvcache.pool import BlockPool
from octavo_kvcache.prefix_index import PrefixIndex
from octavo_kvcache.sequence import SequenceBlocks


class Grower:
    """Plans growths and carries them out. Only the `CacheManager` calls it.

    Args:
        windows: per group the tokens that a query sees, itself included, or None for all.
        pool: the pool of the blocks.
        prefix: forgets cached blocks that are written in place.
        empty_slots: is told of every sequence that changes.
        census: counts copies, and the look-ups of sequences that get their first slots.
        host: is told which blocks get other content.

    """

    __slots__ = ("_census", "_empty_slots", "_host", "_pool", "_prefix", "_windows")

    def __init__(
        self,
        windows: Sequence[int | None],
        pool: BlockPool,
        prefix: PrefixIndex,
        empty_slots: EmptySlots,
        census: Census,
        host: HostTier | None,
    ) -> None:
        self._windows = windows
        self._pool = pool
        self._prefix = prefix
        self._empty_slots = empty_slots
        self._census = census
        self._host = host

    def grow(self, seq: SequenceBlocks, start: int, stop: int) -> Allocation:
        """Make the tokens [start, stop) writable; see `CacheManager.allocate`."""
        return self._carry_out(seq, plan_growth(seq, start, stop, self._windows, self._pool))

    def grow_together(self, sequences: Sequence[SequenceBlocks], start: int) -> list[Allocation]:
        """Make one token writable in each of several sequences; see `CacheManager.allocate_together`."""
        stop = start + 1
        if self._pool.num_free >= len(sequences) * len(self._windows):  # a token takes one block at most
            return [self.grow(seq, start, stop) for seq in sequences]

        def plan(seq: SequenceBlocks) -> Growth:
            return plan_growth(seq, start, stop, self._windows, self._pool, may_spare=False)

        self._pool.require(num_wanted_together([plan(seq) for seq in sequences], self._pool))
        return [self._carry_out(seq, plan(seq)) for seq in sequences]

    def can_grow(self, seq: SequenceBlocks, start: int, stop: int) -> bool:
        """Say whether `grow` would find blocks enough."""
        return plan_growth(seq, start, stop, self._windows, self._pool).num_wanted <= self._pool.num_free

    def _carry_out(self, seq: SequenceBlocks, growth: Growth) -> Allocation:
        self._pool.require(growth.num_wanted)
        self._empty_slots.leave(seq)
        copies, updates = growth.apply(self._pool)
        if self._host is not None:
            self._host.overwrite(growth)
        for group in growth.groups:
            for index in group.cached:
                self._prefix.uncache(group.table.block_ids[index])
        seq.rewind(growth.start)
        seq.first_writable = growth.first_block * seq.block_size
        # A sequence that is not settled is looked at in full each time it grows.
        seq.writable_stop = growth.end_block * seq.block_size if self._empty_slots.enter(seq) else 0
        self._census.num_copies += len(copies)
        if seq.lookup is not None:
            self._census.count_lookup(seq.lookup)
            seq.lookup = None
        if not any(update.block_ids for update in updates):
            return UNCHANGED
        return Allocation(tuple(copies), tuple(updates))
