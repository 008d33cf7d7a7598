"""MirostatRule: keeps each row's surprise near a target by feedback (arXiv 2007.14966), in both of its versions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.batch import NewRow
from octavo_engine.runner.rules import filters
from octavo_engine.runner.rules.distribution import MIN_TEMPERATURE, keep_only, scaled
from octavo_engine.sampling_params import SamplingParams

_NUM_ESTIMATED = 100  # version 1 estimates the exponent of Zipf's law from this many of the likeliest tokens


@dataclass(slots=True)
class _Feedback:
    """The state of one row.

    Attributes:
        sampling: of the request.
        limit: the paper's mu, in bits.
        seen: what the last draw could take, and how surprising each would be.
    """

    sampling: SamplingParams
    limit: float
    seen: tuple[filters.Places, NDArray[np.float64]] | None = None

    def kept(self, scores: filters.Scores) -> filters.Places:
        """Return the tokens that may be drawn, given all scores."""
        if self.sampling.mirostat_mode == 1:
            return filters.top_k(scores, num_kept(scores, self.limit))
        least = math.log(float(np.exp(scores).sum())) - math.log(2) * self.limit
        return np.flatnonzero(scores >= min(least, 0.0))  # the likeliest always may

    def see(self, token_ids: filters.Places, logits: NDArray[np.float32]) -> None:
        """Remember how surprising each of the tokens that may be drawn would be, in bits, given their logits."""
        temperature = max(self.sampling.temperature, MIN_TEMPERATURE)
        scores = (logits.astype(np.float64) - logits.max()) / temperature
        self.seen = token_ids, (math.log(np.exp(scores).sum()) - scores) / math.log(2)

    def learn(self, token_id: int) -> None:
        """Move the limit by how far a drawn token's surprise is from the target."""
        assert self.seen is not None, "a token was appended that was not drawn"
        token_ids, surprises = self.seen
        error = float(surprises[np.searchsorted(token_ids, token_id)]) - self.sampling.mirostat_tau
        self.limit -= self.sampling.mirostat_eta * error
        self.seen = None


def num_kept(scores: filters.Scores, limit: float) -> int:
    """Return how many tokens version 1 keeps (the paper's algorithm 1): 1 to [vocab_size]."""
    in_order = -filters.smallest(-scores, _NUM_ESTIMATED).astype(np.float64)
    in_order = in_order[in_order > filters.LOWEST]
    ranks = np.arange(1, len(in_order))
    steps = np.log((ranks + 1) / ranks)
    exponent = float((steps * (in_order[:-1] - in_order[1:])).sum() / max((steps * steps).sum(), 1e-30))
    excess = exponent - 1
    if exponent <= 0 or abs(excess) < 1e-9:  # a flat distribution, or one where the formula has no value
        return len(scores)
    with np.errstate(over="ignore"):
        tail = 1 - float(np.float64(len(scores)) ** -excess)
        count = (excess * np.exp2(limit) / tail) ** (1 / exponent)
    return int(np.clip(count, 1, len(scores)))


@dataclass(frozen=True, slots=True)
class _Limits:
    """The feedback of some rows of a step's logits."""

    places: list[int]
    feedback: list[_Feedback]

    def apply(self, logits: Tensor) -> None:
        """Remove the tokens above the limit, and remember how surprising those would be that are left."""
        for place, feedback in zip(self.places, self.feedback, strict=True):
            row = logits[place].cpu().numpy()
            scores = scaled(row, feedback.sampling.temperature)
            if scores is not None:
                kept = feedback.kept(scores)
                feedback.see(kept, row[kept])
                keep_only(logits[place], kept)


class MirostatRule:
    """The feedback of each row that uses it; its limit is the row's `sampler_state`."""

    def __init__(self) -> None:
        self._feedback: dict[int, _Feedback] = {}

    def add(self, new: NewRow) -> bool:
        """Fill a row; True if it uses mirostat."""
        sampling = new.sampling
        self._feedback.pop(new.row, None)
        if not sampling.mirostat_mode:
            return False
        limit = 2 * sampling.mirostat_tau if new.sampler_state is None else new.sampler_state
        self._feedback[new.row] = _Feedback(sampling, limit)
        return True

    def of(self, places: NDArray[np.int64], rows: NDArray[np.int64], positions: NDArray[np.int64]) -> _Limits:  # noqa: ARG002
        """Collect the feedback of some rows."""
        return _Limits(places.tolist(), [self._feedback[row] for row in rows.tolist()])

    def append(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Learn from one drawn token in each of some different rows."""
        for row, token_id in zip(rows.tolist(), token_ids.tolist(), strict=True):
            self._feedback[row].learn(token_id)

    def copy(self, row: int, source: int) -> None:
        """Make a row what another one is."""
        self._feedback[row] = replace(self._feedback[source])

    def release(self, rows: Iterable[int]) -> None:
        """Forget rows whose sequences have left."""
        for row in rows:
            self._feedback.pop(row, None)

    def states(self, rows: NDArray[np.int64]) -> dict[int, float]:
        """Return the limits of those of some rows that use mirostat, by place among them."""
        if not self._feedback:
            return {}
        known = ((place, self._feedback.get(row)) for place, row in enumerate(rows.tolist()))
        return {place: feedback.limit for place, feedback in known if feedback is not None}
