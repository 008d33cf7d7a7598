"""RowState: each row's last token on the device, and where in its sequence that token stands."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray


class RowState:
    """What steps in flight leave behind for the next ones. Only the OverlappedRunner writes it.

    Args:
        max_num_rows: rows there can be.
        device: where the model is.

    Attributes:
        last_tokens: [max_num_rows] int64 on the device, the token that each row drew last ahead of the host.
        positions: [max_num_rows] int64, of that token; -1 where there is none. The host may have read it since.
        tenures: [max_num_rows] int64, how often the row has changed hands, so that an answer that comes after its
            sequence has left is not taken for the next one's.
    """

    def __init__(self, max_num_rows: int, device: torch.device) -> None:
        self.last_tokens = torch.zeros(max_num_rows, dtype=torch.int64, device=device)
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
