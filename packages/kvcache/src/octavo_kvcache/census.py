"""Census: counts what the cache holds now and what has happened since the start."""

from dataclasses import replace

from octavo_kvcache.empty_slots import EmptySlots
from octavo_kvcache.lookups import Lookup, LookupCounts
from octavo_kvcache.parked import ParkedBlocks
from octavo_kvcache.pins import Pins
from octavo_kvcache.pool import BlockPool
from octavo_kvcache.stats import CacheStats, HostCounts


class Census:
    """The figures of one cache. Only the `CacheManager` writes it.

    Args:
        block_size: tokens per block.
        pool: the pool of the blocks.
        parked: blocks that only steps in flight hold.
        pins: pinned blocks.
        empty_slots: slots of held blocks without a token.

    Attributes:
        num_copies: blocks copied on write.

    """

    __slots__ = ("_block_size", "_empty_slots", "_lookups", "_parked", "_pins", "_pool", "_resumed", "num_copies")

    def __init__(
        self, block_size: int, pool: BlockPool, parked: ParkedBlocks, pins: Pins, empty_slots: EmptySlots
    ) -> None:
        self._block_size = block_size
        self._pool = pool
        self._parked = parked
        self._pins = pins
        self._empty_slots = empty_slots
        self._lookups = LookupCounts()
        self._resumed = LookupCounts()
        self.num_copies = 0

    def count_lookup(self, lookup: Lookup) -> None:
        """Count the look-up of a sequence that was admitted."""
        (self._resumed if lookup.resumed else self._lookups).add(lookup)

    @property
    def waste(self) -> float:
        """Share of the slots in held blocks without a live token; 0 if none is held."""
        num_used = self._pool.num_used
        return 1 - self._num_live_tokens() / (num_used * self._block_size) if num_used else 0.0

    def stats(self, num_sequences: int, num_deduplicated: int, host: HostCounts) -> CacheStats:
        """Put all figures together."""
        pool, parked = self._pool, self._parked
        return CacheStats(
            num_blocks=pool.num_blocks,
            block_size=self._block_size,
            num_sequences=num_sequences,
            num_free=pool.num_free,
            num_used=pool.num_used,
            num_cached=pool.num_cached,
            num_shared=pool.num_shared,
            num_parked=parked.num_blocks,
            num_pins=len(self._pins),
            num_pinned=self._pins.num_blocks,
            num_table_blocks=pool.num_refs - parked.refs.total(),
            num_live_tokens=self._num_live_tokens(),
            lookups=replace(self._lookups),
            resumed_lookups=replace(self._resumed),
            num_deduplicated=num_deduplicated,
            num_copies=self.num_copies,
            num_evictions=pool.num_evictions,
            host=host,
        )

    def _num_live_tokens(self) -> int:
        num_unique = self._pool.num_used - self._parked.num_blocks
        return num_unique * self._block_size - self._empty_slots.count(self._parked.refs)
