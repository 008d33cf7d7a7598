"""The queue of sequences that wait for a row or for blocks, and what an order of it must offer."""

from __future__ import annotations

import heapq
from typing import Protocol

from octavo_engine.sequence import Sequence, SequenceStatus
from octavo_engine.types import Tenant


class QueuePolicy(Protocol):
    """Who is served next among the sequences that wait. Only the scheduler writes it.

    A sequence that ends while it waits is dropped when it comes to the front, so that ending one costs O(1).
    """

    def __len__(self) -> int: ...

    def push(self, sequence: Sequence) -> None:
        """Let a sequence wait."""
        ...

    def first(self) -> Sequence | None:
        """Return the sequence to be served next; None if nobody waits."""
        ...

    def pop(self, num_tokens: int) -> None:
        """Take out the first sequence, which begins to run and is to compute some tokens of its prompt."""
        ...

    def discard(self) -> None:
        """Note that one of the waiting sequences has ended; its status must say so before the next call."""
        ...

    def charge(self, tenant: Tenant, num_tokens: int) -> None:
        """Count tokens that were generated for a tenant."""
        ...


class WaitingQueue:
    """A `QueuePolicy`: sequences in the order of priority and arrival, whoever they are from."""

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

    def pop(self, num_tokens: int) -> None:  # noqa: ARG002  # what it costs does not matter for this order
        """Take out the first sequence, which begins to run."""
        heapq.heappop(self._heap)
        self._num_waiting -= 1

    def discard(self) -> None:
        """Note that one of the waiting sequences has ended; its status must say so before the next call."""
        self._num_waiting -= 1

    def charge(self, tenant: Tenant, num_tokens: int) -> None:
        """Do nothing: what a tenant has had does not matter for this order."""
