"""MinTokensRule: no stop token is drawn before a sequence has its least number of tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo_engine.batch import NewRow
from octavo_engine.runner.rules.changes import Ban


class MinTokensRule:
    """The stop tokens of rows with `min_tokens`, and from which position on they may be drawn."""

    def __init__(self, max_num_rows: int) -> None:
        self._first_free_position = np.zeros(max_num_rows, np.int64)
        self._stop_token_ids: dict[int, NDArray[np.int64]] = {}

    def add(self, new: NewRow) -> bool:
        """Fill a row; True if it has a least number of tokens and could stop before."""
        if not (new.sampling.min_tokens and new.stop_token_ids):
            return False
        self._first_free_position[new.row] = new.num_prompt_tokens + new.sampling.min_tokens
        self._stop_token_ids[new.row] = np.array(sorted(new.stop_token_ids), np.int64)
        return True

    def of(self, places: NDArray[np.int64], rows: NDArray[np.int64], positions: NDArray[np.int64]) -> Ban | None:
        """Ban the stop tokens of rows that draw too early a token to stop."""
        early = positions < self._first_free_position[rows]
        if not early.any():
            return None
        banned = [self._stop_token_ids[row] for row in rows[early].tolist()]
        return Ban(np.repeat(places[early], [len(ids) for ids in banned]), np.concatenate(banned))

    def append(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Nothing to count: the position says how many tokens there are."""

    def copy(self, row: int, source: int) -> None:
        """Make a row what another one is."""
        self._first_free_position[row] = self._first_free_position[source]
        self._stop_token_ids[row] = self._stop_token_ids[source]
