"""The queue of sequences that wait for a row or for blocks."""

from __future__ import annotations

import heapq

from octavo_engine.sequence import Sequence, SequenceStatus


class WaitingQueue:
    """Sequences in the order of priority and arrival. Only the scheduler writes it.

    A sequence that ends while it waits is dropped when it comes to the front, so that ending one costs O(1).
    """

    def __init__(self) -> None:
        self._heap: list[Sequence] = []
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, sequence: Sequence) -> None:
        """Let a sequence wait."""
        sequence.status = SequenceStatus.WAITING
        heapq.heappush(self._heap, sequence)
        self._num_waiting += 1

    def first(self) -> Sequence | None:
        """Return the sequence to be served next; None if nobody waits."""
        while self._heap and self._heap[0].status is not SequenceStatus.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def pop(self) -> None:
        """Take out the first sequence, which begins to run."""
        heapq.heappop(self._heap)
        self._num_waiting -= 1

    def discard(self) -> None:
        """Note that one of the waiting sequences has ended; its status must say so before the next call."""
        self._num_waiting -= 1
