"""DryRule: a token that would prolong a repetition of what the sequence holds already is penalised.

"Don't repeat yourself" as text-generation-webui and llama.cpp have it: if the last n tokens occurred before and were
followed by a token then, that token's logit loses multiplier * base ** (n - allowed_length) if n is at least
allowed_length; of several occurrences the longest counts. A repetition holds no sequence breaker.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from octavo_engine.batch import NewRow
from octavo_engine.runner.rules.changes import Addition
from octavo_engine.sampling_params import SamplingParams

_MAX_LOG_PENALTY = 80.0  # of the power alone, so that the penalty stays a finite float32


class _Repeats:
    """The tokens of one sequence and, for each of them, how many up to it equal the last ones of the sequence."""

    def __init__(self, token_ids: Sequence[int], breakers: Sequence[int]) -> None:
        self._breakers = frozenset(breakers)
        self._num_tokens = len(token_ids)
        self._token_ids = np.array(token_ids, np.int32)
        is_breaker = np.isin(self._token_ids, np.array(breakers, np.int32))
        self._lengths = np.zeros(self._num_tokens, np.int32)
        # Each round looks one token further back, at the places that have matched so far.
        last, depth, alive = self._num_tokens - 1, 0, np.arange(self._num_tokens - 1)
        while len(alive) and not is_breaker[last - depth]:
            alive = alive[alive >= depth]
            alive = alive[self._token_ids[alive - depth] == self._token_ids[last - depth]]
            depth += 1
            self._lengths[alive] = depth

    def append(self, token_id: int) -> None:
        """Take in the next token: a match goes on where the token is the same, and ends elsewhere."""
        count = self._num_tokens
        if count == len(self._token_ids):
            self._token_ids, self._lengths = (np.concatenate([a, np.zeros(count + 64, np.int32)]) for a in
                                              (self._token_ids, self._lengths))  # fmt: skip
        if token_id in self._breakers:
            self._lengths[:count] = 0
        else:
            longer = np.concatenate([[0], self._lengths[: count - 1]]) + 1
            self._lengths[:count] = np.where(self._token_ids[:count] == token_id, longer, 0)
        self._token_ids[count] = token_id
        self._num_tokens = count + 1

    def copy(self) -> _Repeats:
        """Return one that goes on by itself."""
        other = copy(self)
        other._token_ids, other._lengths = self._token_ids.copy(), self._lengths.copy()
        return other

    def continuations(self, least: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the tokens that followed a match of at least some length, and the longest match of each."""
        places = np.flatnonzero(self._lengths[: self._num_tokens - 1] >= least)
        token_ids, index = np.unique(self._token_ids[places + 1], return_inverse=True)
        longest = np.zeros(len(token_ids), np.int64)
        np.maximum.at(longest, index, self._lengths[places])
        return token_ids.astype(np.int64), longest


class DryRule:
    """The repetitions within each row that has a penalty for them; the prompt counts too."""

    def __init__(self) -> None:
        self._repeats: dict[int, tuple[SamplingParams, _Repeats]] = {}

    def add(self, new: NewRow) -> bool:
        """Fill a row; True if it penalises repetitions."""
        sampling = new.sampling
        if not sampling.dry_multiplier:
            return False
        self._repeats[new.row] = sampling, _Repeats(new.token_ids, sampling.dry_breaker_ids)
        return True

    def of(self, places: NDArray[np.int64], rows: NDArray[np.int64], positions: NDArray[np.int64]) -> Addition | None:  # noqa: ARG002
        """Penalise what would prolong a repetition."""
        token_ids, penalties = zip(*(self._penalties(row) for row in rows.tolist()), strict=True)
        counts = [len(ids) for ids in token_ids]
        if not any(counts):
            return None
        return Addition(np.repeat(places, counts), np.concatenate(token_ids), -np.concatenate(penalties))

    def append(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Take in one drawn token for each of some different rows."""
        for row, token_id in zip(rows.tolist(), token_ids.tolist(), strict=True):
            self._repeats[row][1].append(token_id)

    def copy(self, row: int, source: int) -> None:
        """Make a row what another one is."""
        sampling, repeats = self._repeats[source]
        self._repeats[row] = sampling, repeats.copy()

    def _penalties(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        sampling, repeats = self._repeats[row]
        token_ids, longest = repeats.continuations(sampling.dry_allowed_length)
        log_powers = np.minimum((longest - sampling.dry_allowed_length) * math.log(sampling.dry_base), _MAX_LOG_PENALTY)
        return token_ids, (sampling.dry_multiplier * np.exp(log_powers)).astype(np.float32)
