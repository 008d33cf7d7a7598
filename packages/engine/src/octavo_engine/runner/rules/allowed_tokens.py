"""AllowedTokensRule: the only tokens that a request may draw."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.batch import NewRow
from octavo_engine.runner.rules.changes import Restriction, on_device


class AllowedTokensRule:
    """A mask over the vocabulary for each row that is restricted."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._allowed: dict[int, Tensor] = {}

    def add(self, new: NewRow) -> bool:
        """Fill a row; True if it is restricted."""
        token_ids = new.sampling.allowed_token_ids
        if token_ids is None:
            return False
        allowed = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
        allowed[on_device(np.array(token_ids, np.int64), allowed)] = True
        self._allowed[new.row] = allowed
        return True

    def of(self, places: NDArray[np.int64], rows: NDArray[np.int64], positions: NDArray[np.int64]) -> Restriction:  # noqa: ARG002
        """Collect the masks of some rows."""
        return Restriction(places, torch.stack([self._allowed[row] for row in rows.tolist()]))

    def append(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Nothing to count: a mask stays as it is."""

    def copy(self, row: int, source: int) -> None:
        """Make a row what another one is."""
        self._allowed[row] = self._allowed[source]
