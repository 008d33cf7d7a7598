"""BadWordsRule: the token that would complete a forbidden sequence of tokens is not drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from octavo_engine.batch import NewRow
from octavo_engine.runner.rules.changes import Ban

_ANY = -1  # matches every token, in front of the shorter sequences


class _Words:
    """Forbidden sequences, as a matrix: each row is what comes before the last token, filled up in front."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.last = np.array([ids[-1] for ids in sequences], np.int64)
        self._lengths = np.array([len(ids) - 1 for ids in sequences])
        self.reach = int(self._lengths.max())
        self._before = np.full((len(sequences), self.reach), _ANY, np.int32)
        for prefix, ids in zip(self._before, sequences, strict=True):
            prefix[self.reach - len(ids) + 1 :] = ids[:-1]

    def completed_by(self, tail: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return the tokens that would complete a sequence after the last `reach` tokens, or all if they are fewer."""
        before = self._before[:, self.reach - len(tail) :]
        matches = ((before == tail) | (before == _ANY)).all(axis=1) & (self._lengths <= len(tail))
        completed: NDArray[np.int64] = self.last[matches]
        return completed


class BadWordsRule:
    """The forbidden sequences of each row; the prompt counts as what comes before.

    Args:
        token_ids: [max_num_rows, max_num_tokens + 1] int32, the known tokens of every row; not modified.
    """

    def __init__(self, token_ids: NDArray[np.int32]) -> None:
        self._token_ids = token_ids
        self._words: dict[int, _Words] = {}

    def add(self, new: NewRow) -> bool:
        """Fill a row; True if it has forbidden sequences."""
        sequences = new.sampling.bad_words_ids
        if sequences:
            self._words[new.row] = _Words(sequences)
        return bool(sequences)

    def of(self, places: NDArray[np.int64], rows: NDArray[np.int64], positions: NDArray[np.int64]) -> Ban | None:
        """Ban what would complete a sequence."""
        banned = [
            self._completed(row, position) for row, position in zip(rows.tolist(), positions.tolist(), strict=True)
        ]
        token_ids = np.concatenate(banned)
        return Ban(np.repeat(places, [len(ids) for ids in banned]), token_ids) if len(token_ids) else None

    def append(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Nothing to count: the known tokens are somebody else's."""

    def copy(self, row: int, source: int) -> None:
        """Make a row what another one is."""
        self._words[row] = self._words[source]

    def _completed(self, row: int, position: int) -> NDArray[np.int64]:
        words = self._words[row]
        return words.completed_by(self._token_ids[row, max(position - words.reach, 0) : position])
