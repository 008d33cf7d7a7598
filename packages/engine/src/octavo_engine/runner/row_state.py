"""RowState: which token of each row only the device knows yet, and whose the row is."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class RowState:
    """What steps in flight leave behind for the next ones, as the host keeps it. Only the OverlappedRunner writes it.

    Args:
        max_num_rows: rows there can be.

    Attributes:
        positions: [max_num_rows] int64, of the token that each row drew last ahead of the host; -1 where there is none.
            The host may have read it since.
        tenures: [max_num_rows] int64, how often the row has changed hands, so that an answer that comes after its
            sequence has left is not taken for the next one's.
    """

    def __init__(self, max_num_rows: int) -> None:
        self.positions = np.full(max_num_rows, -1, np.int64)
        self.tenures = np.zeros(max_num_rows, np.int64)

    def hand_over(self, rows: Iterable[int]) -> None:
        """Take note that rows are others' from now on, whose tokens the host knows."""
        for row in rows:
            self.positions[row] = -1
            self.tenures[row] += 1

    def on_device(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return whether the tokens at some positions of some rows are the device's to give."""
        there: NDArray[np.bool_] = self.positions[rows] == positions
        return there
