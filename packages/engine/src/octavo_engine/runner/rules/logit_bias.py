"""LogitBiasRule: numbers that a request adds to the logits of tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo_engine.batch import NewRow
from octavo_engine.runner.rules.changes import Addition


class LogitBiasRule:
    """What is added to which tokens, by row."""

    def __init__(self) -> None:
        self._biases: dict[int, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}

    def add(self, new: NewRow) -> bool:
        """Fill a row; True if it has a bias."""
        bias = new.sampling.logit_bias
        if bias:
            self._biases[new.row] = np.array([*bias], np.int64), np.array([*bias.values()], np.float32)
        return bool(bias)

    def of(self, places: NDArray[np.int64], rows: NDArray[np.int64], positions: NDArray[np.int64]) -> Addition:  # noqa: ARG002
        """Collect the biases of some rows."""
        token_ids, values = zip(*(self._biases[row] for row in rows.tolist()), strict=True)
        return Addition(
            np.repeat(places, [len(ids) for ids in token_ids]), np.concatenate(token_ids), np.concatenate(values)
        )

    def append(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Nothing to count: a bias stays as it is."""

    def copy(self, row: int, source: int) -> None:
        """Make a row what another one is."""
        self._biases[row] = self._biases[source]
