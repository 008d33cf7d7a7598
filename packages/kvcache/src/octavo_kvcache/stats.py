"""CacheStats: what the cache holds at one moment, counted exactly."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from octavo_kvcache.lookups import LookupCounts
from octavo_kvcache.pool import BlockPool
from octavo_kvcache.table import BlockTable


@dataclass(frozen=True, slots=True)
class HostCounts:
    """What the host tier holds; without one, nothing.

    Attributes:
        num_blocks: host blocks, block 0 included.
        num_used: host blocks that a sequence holds.
        num_sequences: sequences that are swapped out.
        num_blocks_out, num_blocks_in: blocks copied to the host, and back from it, since the start.

    """

    num_blocks: int = 0
    num_used: int = 0
    num_sequences: int = 0
    num_blocks_out: int = 0
    num_blocks_in: int = 0

    @property
    def usage(self) -> float:
        """Share of the host blocks that are held; block 0 never is."""
        return self.num_used / (self.num_blocks - 1) if self.num_blocks else 0.0


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts of blocks and tokens. With several groups, a token counts once per group that holds it.

    Attributes:
        num_blocks: blocks in storage, the null block included.
        block_size: tokens per block.
        num_sequences: sequences that exist.
        num_free: blocks that can be allocated now; num_free + num_used = num_usable.
        num_used: blocks that a sequence, a pin, or a step in flight holds.
        num_cached: free blocks whose content can still be hit.
        num_shared: blocks that more than one holder has.
        num_parked: used blocks that only steps in flight hold.
        num_pins: pins, those still to be computed included.
        num_pinned: blocks that pins hold.
        num_table_blocks: sum of the lengths of all block tables, and of all pins, null blocks not counted.
        num_live_tokens: tokens computed, or scheduled in the current step; those in a shared block count once.
        lookups: look-ups in the prefix cache for sequences that were admitted for the first time.
        resumed_lookups: those for sequences that had lost their blocks and were admitted again.
        num_deduplicated: blocks given back because another one had the same content, since the start.
        num_copies: blocks copied on write, since the start.
        num_evictions: cached blocks that were given to new content, since the start.
        host: the host tier, and the sequences that are swapped out.

    """

    num_blocks: int
    block_size: int
    num_sequences: int
    num_free: int
    num_used: int
    num_cached: int
    num_shared: int
    num_parked: int
    num_pins: int
    num_pinned: int
    num_table_blocks: int
    num_live_tokens: int
    lookups: LookupCounts
    resumed_lookups: LookupCounts
    num_deduplicated: int
    num_copies: int
    num_evictions: int
    host: HostCounts = HostCounts()

    @property
    def num_usable(self) -> int:
        """Blocks that can ever be allocated: all but the null block."""
        return self.num_blocks - 1

    @property
    def usage(self) -> float:
        """Share of the usable blocks that are held."""
        return self.num_used / self.num_usable

    @property
    def waste(self) -> float:
        """Share of the slots in held blocks without a live token: 1 - live / (used * block_size); 0 if none is held."""
        return 1 - self.num_live_tokens / (self.num_used * self.block_size) if self.num_used else 0.0

    @property
    def sharing_saved(self) -> float:
        """Share of blocks that sharing saves: 1 - unique blocks in tables / sum of table lengths; 0 without tables."""
        if not self.num_table_blocks:
            return 0.0
        return 1 - (self.num_used - self.num_parked) / self.num_table_blocks

    @property
    def hit_rate(self) -> float:
        """Share of the tokens looked up for sequences admitted for the first time that were cached."""
        return self.lookups.hit_rate


def count_empty_slots(tables: Iterable[BlockTable], pool: BlockPool, parked: Counter[int]) -> int:
    """Count the slots without a token in the blocks of `tables`, those of a shared block once: O(tables).

    Every block is full but those at the end of a table. A shared block has empty slots only if it lies at the end of
    every table that holds it.

    Args:
        tables: those looked at; every table that ends in a block of one of them must be there.
        pool: the pool of their blocks.
        parked: how many references a step in flight holds, by block.

    """
    num_empty = 0
    shared_ends: dict[int, tuple[int, int]] = {}  # block: tables that end in it, the fewest empty
    for table in tables:
        num_tokens, block_ids, block_size = table.num_tokens, table.block_ids, table.block_size
        for index in range(max(num_tokens // block_size, table.num_null), len(block_ids)):
            block_id = block_ids[index]
            num_here = max(0, num_tokens - index * block_size)
            if pool.ref_count(block_id) == 1:
                num_empty += block_size - num_here
            else:
                num_ends, fewest = shared_ends.get(block_id, (0, block_size))
                shared_ends[block_id] = num_ends + 1, min(fewest, block_size - num_here)
    for block_id, (num_ends, fewest) in shared_ends.items():
        if num_ends == pool.ref_count(block_id) - parked[block_id]:
            num_empty += fewest
    return num_empty
