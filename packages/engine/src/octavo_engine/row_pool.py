"""The runner's rows, as the scheduler hands them out."""

from __future__ import annotations


class RowPool:
    """Rows of the runner: free, taken, or reserved for the forks of a request that has not forked yet.

    Only the scheduler writes it. A released row may be taken again at once: the batch that brings its new sequence
    also names it as finished, and the runner releases rows before it fills them.
    """

    def __init__(self, num_rows: int) -> None:
        self._free = list(range(num_rows - 1, -1, -1))
        self._num_reserved = 0
        self._finished: list[int] = []

    @property
    def num_available(self) -> int:
        """Rows that are neither taken nor reserved."""
        return len(self._free) - self._num_reserved

    def reserve(self, num_rows: int) -> None:
        """Set rows aside for later forks."""
        self._num_reserved += num_rows

    def unreserve(self, num_rows: int) -> None:
        """Give up a reservation, to take the rows or to leave them to others."""
        self._num_reserved -= num_rows

    def take(self) -> int:
        """Take a row."""
        return self._free.pop()

    def release(self, row: int) -> None:
        """Give a row back; the next batch tells the runner."""
        self._free.append(row)
        self._finished.append(row)

    def take_finished(self) -> tuple[int, ...]:
        """Return the rows released since the last call, for the batch to name."""
        finished, self._finished = tuple(self._finished), []
        return finished
