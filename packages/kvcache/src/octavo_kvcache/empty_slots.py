"""EmptySlots: how many slots of held blocks have no token in them, kept up to date as tables change."""

from collections import Counter
from collections.abc import Iterable, Iterator, Set

from octavo_kvcache.pool import BlockPool
from octavo_kvcache.sequence import SequenceBlocks
from octavo_kvcache.stats import count_empty_slots
from octavo_kvcache.table import BlockTable


class EmptySlots:
    """The empty slots of all sequences. Only the `CacheManager` writes it.

    Every block is full but those at the end of a table. A sequence is settled while those belong to it alone and can
    not be hit: then its empty slots are its capacity less its tokens, and growing by a token within its last block
    makes one less of them. Few sequences are not settled, and none for long: forks that have not written yet, and
    sequences that took tokens back. Their ends are looked at when the number is asked for.

    Attributes:
        num_settled: empty slots of the settled sequences.

    """

    __slots__ = ("_pool", "_unsettled", "num_settled")

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._unsettled: set[SequenceBlocks] = set()
        self.num_settled = 0

    def enter(self, seq: SequenceBlocks) -> bool:
        """Count a sequence that is new or has changed; say whether it is settled."""
        settled = all(self._is_settled(table) for table in seq.tables)
        if settled:
            self.num_settled += _num_spare(seq)
        else:
            self._unsettled.add(seq)
        return settled

    def leave(self, seq: SequenceBlocks) -> None:
        """Forget a sequence that is about to change or to end; its tables must still be what they were."""
        if seq in self._unsettled:
            self._unsettled.remove(seq)
        else:
            self.num_settled -= _num_spare(seq)

    def recount(self, sequences: Iterable[SequenceBlocks], block_ids: Set[int]) -> None:
        """Look again at those of some sequences that end in one of `block_ids`, which have a holder more."""
        for seq in sequences:
            ends = (table.block_ids[table.num_tokens // table.block_size :] for table in seq.tables)
            if not all(block_ids.isdisjoint(end) for end in ends):
                self.leave(seq)
                self.enter(seq)

    def count(self, parked: Counter[int]) -> int:
        """Return the number of empty slots, those of a shared block once.

        Args:
            parked: how many references a step in flight holds, by block.

        """
        if not self._unsettled:
            return self.num_settled
        return self.num_settled + count_empty_slots(self._unsettled_tables(), self._pool, parked)

    def _unsettled_tables(self) -> Iterator[BlockTable]:
        return (table for seq in self._unsettled for table in seq.tables)

    def _is_settled(self, table: BlockTable) -> bool:
        pool, first = self._pool, table.num_tokens // table.block_size
        return table.num_null <= first and all(
            pool.ref_count(block_id) == 1 and pool.block_hash(block_id) is None for block_id in table.block_ids[first:]
        )


def _num_spare(seq: SequenceBlocks) -> int:
    return sum(table.capacity - table.num_tokens for table in seq.tables)
