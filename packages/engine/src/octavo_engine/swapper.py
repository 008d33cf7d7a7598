"""Swapper: moves the blocks of waiting sequences to the host and back, where the preemption policy wants it."""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceABC

from octavo_engine.preemption import PreemptionPolicy
from octavo_engine.sequence import Sequence
from octavo_kvcache import BlockCopy, CacheFull, CacheManager

_log = logging.getLogger(__name__)


class Swapper:
    """The way of sequences between the tiers of the cache. Only the scheduler writes it.

    Copies are data: they wait in `copies`, in the order in which they were decided, among those of copy-on-write, until
    the next batch takes them along. Blocks are given out as if the copies had been made; the order makes it true.

    Args:
        cache: the block manager.
        policy: chooses between swapping and computing again; None never swaps.

    Attributes:
        copies: what the next batch must copy before it computes, in order.
        step_id: the step that will bring these copies.
    """

    def __init__(self, cache: CacheManager, policy: PreemptionPolicy | None) -> None:
        self._host = cache.host
        self._policy = policy
        self.copies: list[BlockCopy] = []
        self.step_id = 0

    def has(self, sequence: Sequence) -> bool:
        """Return whether a sequence's blocks are on the host."""
        return self._host is not None and sequence.seq_id in self._host

    def try_out(self, sequences: SequenceABC[Sequence]) -> bool:
        """Move the blocks of sequences that are preempted together to the host.

        Returns:
            False, and nothing has changed, if it is better to compute them again, or the host has no room.
        """
        # What a row has collected of a whole prompt is lost with it.
        if self._host is None or self._policy is None or any(sequence.needs_whole_prompt for sequence in sequences):
            return False
        seq_ids = [sequence.seq_id for sequence in sequences]
        if not self._policy.prefers_swap(self._host.size(seq_ids)):
            return False
        try:
            self.copies += self._host.swap_out(seq_ids)
        except CacheFull as error:
            _log.debug("preemption: the host is full (%s), so %d sequences are computed again", error, len(seq_ids))
            return False
        self._mark(sequences)
        return True

    def try_in(self, sequences: SequenceABC[Sequence], num_spare: int) -> bool:
        """Give sequences that were swapped out together their blocks again; False if `num_spare` would not be left."""
        assert self._host is not None
        try:
            self.copies += self._host.swap_in([sequence.seq_id for sequence in sequences], num_spare=num_spare)
        except CacheFull:
            return False
        self._mark(sequences)
        return True

    def put_back(self, sequence: Sequence) -> None:
        """Move the blocks of a sequence that did not begin to run after all to the host again, where they were."""
        assert self._host is not None
        self.copies += self._host.swap_out([sequence.seq_id])

    def drop(self, sequence: Sequence) -> None:
        """Free the host blocks of a sequence, if it has any."""
        if self._host is not None and self.has(sequence):
            self._host.free(sequence.seq_id)

    def distrust_copies(self) -> None:
        """Take note that a step failed: copies of its own and of later ones may not have been made."""
        if self._host is not None:
            self._host.distrust_copies()

    def _mark(self, sequences: SequenceABC[Sequence]) -> None:
        for sequence in sequences:
            sequence.moved_by = self.step_id
