"""Answer: a ModelOutput in the making."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.batch import ModelOutput
from octavo_engine.runner.candidates import Candidates
from octavo_engine.runner.sampler import Drawn
from octavo_engine.types import TokenLogprobs

_UNSOUND = "the model's output for this sequence is not a finite number"


class Answer:
    """Collects what a step brought to each place of its batch.

    Args:
        num_rows: places.
    """

    def __init__(self, num_rows: int) -> None:
        self._token_ids: list[tuple[int, ...]] = [()] * num_rows
        self._logprobs: list[tuple[TokenLogprobs, ...] | None] | None = None
        self._pooled: dict[int, tuple[float, ...]] = {}
        self._states: dict[int, float] = {}
        self._prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        self._candidates: dict[int, tuple[list[int], list[float]]] = {}
        self._errors: dict[int, str] = {}

    def add_drawn(self, places: NDArray[np.int64], drawn: Drawn) -> None:
        """Put a draw's tokens, one for each of the ascending `places`, where they belong."""
        token_ids = drawn.token_ids.tolist()
        if drawn.all_sound and drawn.logprobs is None and len(token_ids) == len(self._token_ids):
            self._token_ids = [*zip(token_ids)]  # a tuple of one for each token
            return
        if drawn.logprobs is not None:
            self._logprobs = [None] * len(self._token_ids)
        for index, place in enumerate(places.tolist()):
            if not drawn.sound[index]:
                self._errors[place] = drawn.errors.get(index, _UNSOUND)
                continue
            self._token_ids[place] = (token_ids[index],)
            entry = drawn.logprobs[index] if drawn.logprobs is not None else None
            if self._logprobs is not None and entry is not None:
                self._logprobs[place] = (entry,)

    def add_forced(self, place: int, token_ids: list[int]) -> None:
        """Put tokens behind the one that was drawn."""
        self._token_ids[place] += tuple(token_ids)

    def add_states(self, places: NDArray[np.int64], states: Mapping[int, float]) -> None:
        """Put the states of some draws, by their index among the ascending `places`, where they belong."""
        for index, state in states.items():
            self._states[int(places[index])] = state

    def add_prompt_logprobs(self, prompts: Mapping[int, tuple[TokenLogprobs, ...]]) -> None:
        """Put the log-probabilities of prompts, by place, where they belong."""
        self._prompt_logprobs.update(prompts)

    def add_candidates(self, places: NDArray[np.int64], found: Candidates) -> None:
        """Put the candidates of rows that search where they belong."""
        rows = zip(places.tolist(), found.token_ids.tolist(), found.logprobs.tolist(), strict=True)
        for index, (place, token_ids, logprobs) in enumerate(rows):
            if isnan(logprobs[0]) or index in found.errors:
                self._errors[place] = found.errors.get(index, _UNSOUND)
            else:
                self._candidates[place] = token_ids, logprobs

    def add_pooled(self, place: int, vector: Tensor) -> None:
        """Put an embedding in its place."""
        if bool(vector.isfinite().all()):
            self._pooled[place] = tuple(vector.tolist())
        else:
            self._errors[place] = _UNSOUND

    def output(self) -> ModelOutput:
        """Return all of it."""
        return ModelOutput(
            token_ids=tuple(self._token_ids),
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            pooled=self._pooled or None,
            sampler_states=self._states or None,
            prompt_logprobs=self._prompt_logprobs or None,
            candidates=self._candidates or None,
            errors=self._errors or None,
        )
