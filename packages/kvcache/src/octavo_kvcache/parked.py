"""ParkedBlocks: blocks of sequences that have ended, held until the steps in flight that still use them end."""

from collections import Counter
from itertools import chain

from octavo_kvcache.pool import BlockPool


class ParkedBlocks:
    """References that only steps in flight have. Only the `CacheManager` writes it.

    Args:
        pool: the pool of the blocks, to which they are released.

    Attributes:
        refs: how many references are parked, by block.

    """

    __slots__ = ("_last_step_done", "_parked", "_pool", "refs")

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._parked: list[tuple[int, list[int]]] = []
        self._last_step_done: int | None = None
        self.refs: Counter[int] = Counter()

    @property
    def num_blocks(self) -> int:
        """Blocks that nobody but a step in flight holds."""
        return sum(num_refs == self._pool.ref_count(block_id) for block_id, num_refs in self.refs.items())

    def add(self, block_ids: list[int], after: int | None) -> None:
        """Release references when step `after` ends: at once if it has, or is None."""
        if after is None or (self._last_step_done is not None and after <= self._last_step_done):
            self._pool.release(block_ids)
        elif block_ids:
            self._parked.append((after, block_ids))
            self.refs.update(block_ids)

    def step_done(self, step_id: int) -> None:
        """Release what waits for this step or one before it."""
        self._last_step_done = step_id
        if not self._parked:
            return
        parked, self._parked = self._parked, []
        for after, block_ids in parked:
            if after <= step_id:
                self._pool.release(block_ids)
            else:
                self._parked.append((after, block_ids))
        self.refs = Counter(chain.from_iterable(block_ids for _, block_ids in self._parked))
