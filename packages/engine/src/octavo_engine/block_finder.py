"""BlockFinder: blocks for running sequences, taken from what is kept and from those that run last if there are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from octavo_engine.residents import Residents
from octavo_engine.sequence import Sequence
from octavo_engine.step import StepBuilder
from octavo_kvcache import Allocation, CacheFull

T = TypeVar("T")


class BlockFinder:
    """Allocates for sequences that run, and preempts others for it, the last in order first.

    Args:
        residents: the sequences.
    """

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        self._cache = residents.cache

    def allocate(self, step: StepBuilder, sequence: Sequence, num_new: int) -> Allocation | None:
        """Find blocks for the next tokens of a sequence; None if it must wait or was itself preempted."""
        try:
            return self._cache.allocate(sequence.seq_id, sequence.num_computed_tokens, num_new)
        except CacheFull:
            return self.find(
                step, sequence, lambda: self._cache.allocate(sequence.seq_id, sequence.num_computed_tokens, num_new)
            )

    def find(self, step: StepBuilder, sequence: Sequence, allocate: Callable[[], T]) -> T | None:
        """Allocate for a sequence, or for beams of its group; None if it must wait or was itself preempted."""
        while True:
            try:
                return allocate()
            except CacheFull:
                step.short_of_blocks = True
            if self._cache.stats().num_parked:  # a step in flight will give blocks back
                return None
            if self._residents.kept.give_up_blocks():
                continue
            victim = next((s for s in reversed(self._residents.running) if not _takes_part(s, step)), sequence)
            own = victim is sequence or (victim.beams is not None and victim.beams is sequence.beams)
            if own and step:  # those that go ahead will make room
                return None
            assert not own or not self._runs_alone(sequence), "a sequence, or a group of beams, alone always fits"
            self._preempt(victim)
            if own:
                return None

    def _runs_alone(self, sequence: Sequence) -> bool:
        own = [sequence] if sequence.beams is None else sequence.beams.members
        return all(running in own for running in self._residents.running)

    def _preempt(self, sequence: Sequence) -> None:
        if sequence.beams is None:
            self._residents.preempt(sequence)
        else:
            sequence.beams.preempt()


def _takes_part(sequence: Sequence, step: StepBuilder) -> bool:
    """Return whether a sequence, or another beam of its group, is in a step."""
    return sequence in step or (sequence.beams is not None and any(m in step for m in sequence.beams.members))
