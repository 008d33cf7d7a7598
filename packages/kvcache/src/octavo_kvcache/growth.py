"""Growth: what has to happen to the blocks of one sequence before a step may write its tokens."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from octavo_kvcache.allocation import TableUpdate
from octavo_kvcache.block import BlockCopy
from octavo_kvcache.errors import InvalidArgument
from octavo_kvcache.pool import BlockPool
from octavo_kvcache.prefix import num_blocks_behind
from octavo_kvcache.sequence import SequenceBlocks
from octavo_kvcache.table import BlockTable


@dataclass(frozen=True, slots=True)
class GroupGrowth:
    """The part of a growth that concerns one group.

    Attributes:
        table: the block table.
        num_behind: leading blocks that are to be null blocks.
        num_released: blocks that become free by that.
        replaced: indices of blocks that are written and that others hold too, or that the prefix cache keeps.
        cached: indices of blocks that are written in place although they can be hit: they leave the prefix cache.
        num_appended: blocks to append.

    """

    table: BlockTable
    num_behind: int
    num_released: int
    replaced: list[int]
    cached: list[int]
    num_appended: int

    @property
    def num_fresh(self) -> int:
        return len(self.replaced) + self.num_appended


@dataclass(frozen=True, slots=True)
class Growth:
    """A plan to make the tokens [start, stop), which lie in the table entries [first_block, end_block), writable."""

    start: int
    stop: int
    first_block: int
    end_block: int
    groups: tuple[GroupGrowth, ...]

    @property
    def num_wanted(self) -> int:
        """Free blocks needed; at most 0 when the blocks behind a window make up for all that is added."""
        return sum(group.num_fresh - group.num_released for group in self.groups)

    def sparing_cached(self) -> "Growth":
        """Return a plan that copies the blocks which can be hit, as if somebody else held them."""
        groups = (replace(g, replaced=sorted(g.replaced + g.cached), cached=[]) for g in self.groups)
        return replace(self, groups=tuple(groups))

    def apply(self, pool: BlockPool) -> tuple[list[BlockCopy], list[TableUpdate]]:
        """Carry it out; return the copies and one update per group. The pool must have `num_wanted` blocks free."""
        old = [(group.table.num_null, len(group.table.block_ids)) for group in self.groups]
        for group in self.groups:
            pool.release(group.table.skip(group.num_behind))
        copies: list[BlockCopy] = []
        updates: list[TableUpdate] = []
        for group, (num_null, length) in zip(self.groups, old, strict=True):
            copies += self._write(group, pool)
            updates.append(_changed_run(group, num_null, length))
        return copies, updates

    def _write(self, group: GroupGrowth, pool: BlockPool) -> list[BlockCopy]:
        table, fresh, copies = group.table, pool.allocate(group.num_fresh), []
        for index, dst in zip(group.replaced, fresh, strict=False):
            src = table.block_ids[index]
            if index * table.block_size < self.start:  # else all that is in the block is about to be overwritten
                copies.append(BlockCopy(src, dst))
            table.block_ids[index] = dst
            pool.release([src])
        table.grow(fresh[len(group.replaced) :])
        table.num_tokens = self.stop
        return copies


def plan_growth(
    seq: SequenceBlocks,
    start: int,
    stop: int,
    windows: Sequence[int | None],
    pool: BlockPool,
    *,
    may_spare: bool = True,
) -> Growth:
    """Find out what makes the tokens [start, stop) writable. Changes nothing.

    A cached block that only this sequence holds is copied while blocks are free for it, so that it can be hit again.
    When none is, to write it in place gives up no more than to evict it would.

    Args:
        seq: the sequence.
        start: first token written; at most the number of tokens the tables have.
        stop: one past the last token written.
        windows: per group the tokens that a query sees, or None for all.
        pool: the pool of the blocks.
        may_spare: whether to copy what is only cached; False takes no more blocks than needed.

    Raises:
        InvalidArgument: negative numbers, a gap, or tokens behind a window.

    """
    if not 0 <= start <= min(stop, seq.num_tokens):
        raise InvalidArgument(
            f"tokens [{start}, {stop}) can not be allocated after {seq.num_tokens} tokens; "
            "num_computed_tokens must be at most the tokens allocated before, num_new_tokens at least 0"
        )
    size = seq.block_size
    first = start // size
    end = -(-stop // size) if stop > start else first
    groups = []
    for table, window in zip(seq.tables, windows, strict=True):
        num_behind = 0
        if window is not None:
            if table.num_null > num_blocks_behind(window, start, size):
                raise InvalidArgument(
                    f"token {start} can not be computed again: the blocks that its window of {window} tokens needs "
                    "were released; free the sequence and match it anew"
                )
            # tokens that are not committed may be taken back, so only committed ones move the window
            num_behind = num_blocks_behind(window, min(start, seq.num_committed), size)
        groups.append(_plan_group(table, first, end, num_behind, pool))
    growth = Growth(start, stop, first, end, tuple(groups))
    if may_spare and any(group.cached for group in groups):
        sparing = growth.sparing_cached()
        return sparing if sparing.num_wanted <= pool.num_free else growth
    return growth


def num_wanted_together(growths: Sequence[Growth], pool: BlockPool) -> int:
    """Count the free blocks that several growths need one after the other.

    The last writer of a block that nobody else holds writes in place.
    """
    num_writers = Counter(
        group.table.block_ids[index] for growth in growths for group in growth.groups for index in group.replaced
    )
    num_in_place = sum(pool.ref_count(block_id) == num for block_id, num in num_writers.items())
    return sum(growth.num_wanted for growth in growths) - num_in_place


def _plan_group(table: BlockTable, first: int, end: int, num_behind: int, pool: BlockPool) -> GroupGrowth:
    length = len(table.block_ids)
    replaced, cached = [], []
    for index in range(first, min(end, length)):
        block_id = table.block_ids[index]
        if pool.ref_count(block_id) > 1:
            replaced.append(index)
        elif pool.block_hash(block_id) is not None:
            cached.append(index)
    return GroupGrowth(
        table=table,
        num_behind=num_behind,
        num_released=sum(pool.ref_count(block_id) == 1 for block_id in table.block_ids[table.num_null : num_behind]),
        replaced=replaced,
        cached=cached,
        num_appended=max(0, end - length),
    )


def _changed_run(group: GroupGrowth, num_null: int, length: int) -> TableUpdate:
    """Return the entries from the first to the last changed one, for a table that had these numbers before."""
    table = group.table
    changed = [*range(num_null, table.num_null), *group.replaced, *range(length, len(table.block_ids))]
    if table.deduplicated:
        changed = sorted(changed + table.deduplicated)
        table.deduplicated.clear()
    if not changed:
        return TableUpdate(length, ())
    return TableUpdate(changed[0], tuple(table.block_ids[changed[0] : changed[-1] + 1]))
