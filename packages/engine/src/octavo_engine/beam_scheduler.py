"""BeamScheduler: what a step computes of the beams of one request."""

from __future__ import annotations

from collections.abc import Callable

from octavo_engine.beam_group import BeamGroup
from octavo_engine.sequence import Sequence
from octavo_engine.step import StepBuilder
from octavo_kvcache import Allocation, CacheManager

FindBlocks = Callable[[StepBuilder, Sequence, Callable[[], list[Allocation]]], list[Allocation] | None]
"""Allocates for a sequence, preempting later ones if need be; None if it must wait or was itself preempted."""


class BeamScheduler:
    """Schedules beam groups: all members at once, or, after preemption, one after the other up to their last tokens.

    Args:
        cache: the block manager.
        find_blocks: allocates, at the cost of others.
    """

    def __init__(self, cache: CacheManager, find_blocks: FindBlocks) -> None:
        self._cache = cache
        self._find_blocks = find_blocks

    def go_on(self, step: StepBuilder, group: BeamGroup) -> None:
        """Schedule what a running group can compute next; nothing while its answer is in flight."""
        if group.awaits_answer:
            return
        if len(group.members) == 1:
            self._compute(step, group, group.leader, group.leader.num_uncomputed_tokens)
        elif self._caught_up(step, group):
            self._compute_together(step, group)

    def _caught_up(self, step: StepBuilder, group: BeamGroup) -> bool:
        """Return whether all members stand before their last token; if not, let the next one come nearer to it."""
        for member in group.members:
            if member.row is None:
                group.enter(member)
            num_behind = member.num_uncomputed_tokens - 1
            if num_behind:
                self._compute(step, group, member, num_behind)
                return False  # others share blocks that this one fills, so they follow in a later step
        return True

    def _compute(self, step: StepBuilder, group: BeamGroup, member: Sequence, num_wanted: int) -> None:
        """Schedule up to `num_wanted` tokens of one member."""
        num_new = min(num_wanted, step.budget)
        if not num_new:
            return

        def allocate() -> list[Allocation]:
            return [self._cache.allocate(member.seq_id, member.num_computed_tokens, num_new)]

        allocations = self._find_blocks(step, member, allocate)
        if allocations is not None:
            self._add(step, group, member, num_new, allocations[0])
            self._tell_moves(step, group)

    def _compute_together(self, step: StepBuilder, group: BeamGroup) -> None:
        """Schedule the last token of every member, or nothing."""
        members = group.members
        if step.budget < len(members):
            return
        seq_ids = [member.seq_id for member in members]

        def allocate() -> list[Allocation]:
            return self._cache.allocate_together(seq_ids, group.leader.num_computed_tokens)

        allocations = self._find_blocks(step, group.leader, allocate)
        if allocations is not None:
            for member, allocation in zip(members, allocations, strict=True):
                self._add(step, group, member, 1, allocation)
            self._tell_moves(step, group)

    def _add(self, step: StepBuilder, group: BeamGroup, member: Sequence, num_new: int, allocation: Allocation) -> None:
        if member in group.unknown:
            group.unknown.remove(member)
            step.add_new(member, num_new, allocation, self._cache.block_ids(member.seq_id))
        else:
            step.add_cached(member, num_new, allocation)

    def _tell_moves(self, step: StepBuilder, group: BeamGroup) -> None:
        step.add_moves(group.moves)
        group.moves.clear()
