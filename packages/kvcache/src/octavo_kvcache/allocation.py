"""Allocation: what an allocation changed, as data that a runner with its own rows can apply."""

from dataclasses import dataclass
from typing import NamedTuple

from octavo_kvcache.block import BlockCopy


class TableUpdate(NamedTuple):
    """A run of entries of one block table: table[first_index : first_index + len(block_ids)] = block_ids.

    It may replace entries (copy-on-write, null blocks behind a window), append entries, or both.
    """

    first_index: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Allocation:
    """The changes of one `CacheManager.allocate`.

    Attributes:
        copies: blocks to copy before the step writes, in this order.
        updates: one per group, or () when no table changed.

    """

    copies: tuple[BlockCopy, ...] = ()
    updates: tuple[TableUpdate, ...] = ()


UNCHANGED = Allocation()
"""The answer to an allocation that fitted into blocks the sequence already had for itself."""
