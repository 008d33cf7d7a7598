"""BeamSearch: which beams of one request go on, which hypotheses are kept, and when the search ends.

It knows no sequences, rows or blocks: candidates go in, and out comes who goes on where. The rules are those of
Transformers' `generate(num_beams=...)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from octavo_engine.beam_params import EarlyStopping
from octavo_engine.stop_automaton import StopAutomaton
from octavo_engine.types import TokenLogprobs

Candidates = tuple[Sequence[int], Sequence[float]]
"""The likeliest next tokens of a beam, best first, and their log-probabilities."""


class Place(NamedTuple):
    """A beam after a step: it continues the beam that had place `source` before the step by a token."""

    source: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A sequence that has ended.

    Attributes:
        token_ids: the one that ended it included.
        score: with the length penalty.
        stopped: whether a stop token or a stop string ended it; the limit did otherwise.
        stop_token_id: the stop token that ended it; None if something else did.
        logprobs: one entry for each token; None if none were asked for.
    """

    token_ids: tuple[int, ...]
    score: float
    stopped: bool
    stop_token_id: int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None


class _Beam(NamedTuple):
    """Tokens, the sum of their log-probabilities, and how near their text has come to a stop string."""

    token_ids: tuple[int, ...]
    score: float
    logprobs: tuple[TokenLogprobs, ...] = ()
    stop_state: int = 0


class _Continuation(NamedTuple):
    """A beam and its candidate number `rank`, the best being 0."""

    score: float
    source: int
    rank: int


class BeamSearch:
    """The state of one search; it begins with one beam, the prompt, at place 0.

    Args:
        width: beams, and hypotheses, that are kept.
        max_num_tokens: length at which every beam ends.
        length_penalty, early_stopping: as in BeamSearchParams.
        stop_token_ids: tokens that end a hypothesis.
        stops: stop strings, each of which ends a hypothesis whose text holds it; None if there are none.
        min_tokens: tokens at the beginning in whose text no stop string is looked for.
        num_top_logprobs: how many of the likeliest tokens are kept for each token of a beam; None keeps none.

    Attributes:
        finished: whether the search has ended.
        hypotheses: those kept, best first.
    """

    def __init__(
        self,
        width: int,
        *,
        max_num_tokens: int,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        stop_token_ids: Iterable[int] = (),
        stops: StopAutomaton | None = None,
        min_tokens: int = 0,
        num_top_logprobs: int | None = None,
    ) -> None:
        self.finished = False
        self.hypotheses: list[Hypothesis] = []
        self._width = width
        self._max_num_tokens = max_num_tokens
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._stop_token_ids = frozenset(stop_token_ids)
        self._stops = stops
        self._min_tokens = min_tokens
        # Enough for `width` that no stop token ends; with stop strings, as many as Transformers looks at.
        self._num_considered = max(1 + len(self._stop_token_ids), 1 if stops is None else 2) * width
        self._num_top_logprobs = num_top_logprobs
        self._beams = [_Beam((), 0.0)]
        self._num_tokens = 0

    @property
    def num_candidates(self) -> int:
        """Candidates that each beam needs: those to choose from, and those to report."""
        return max(self._num_considered, self._num_top_logprobs or 0)

    def advance(self, candidates: Sequence[Candidates]) -> list[Place | None]:
        """Take in the candidates of every beam in the order of places; return who has each place now.

        The best continuation of a beam stays at its place. Further ones take the places of beams that are not
        continued, then new ones at the end; a place that stays empty is None and does not exist afterwards.
        """
        best = self._best(candidates)
        self._num_tokens += 1
        at_limit = self._num_tokens == self._max_num_tokens
        going: list[_Continuation] = []
        for rank, continuation in enumerate(best):
            stopped = self._stopped_by(candidates[continuation.source][0][continuation.rank], continuation.source)
            if not stopped and not at_limit:
                going.append(continuation)
            elif rank < self._width:  # others have no better claim to it than beams that go on
                self._keep(self._extended(continuation, candidates), stopped)
        places = _placed(going[: self._width], len(self._beams))
        self._beams = [self._extended(c, candidates) for c in places if c is not None]
        self.finished = at_limit or not self._beams or self._cannot_improve()
        return [None if c is None else Place(c.source, candidates[c.source][0][c.rank]) for c in places]

    def _best(self, candidates: Sequence[Candidates]) -> list[_Continuation]:
        """Return the best continuations over all beams, in order."""
        everyone = [
            _Continuation(beam.score + logprob, source, rank)
            for source, (beam, (_, logprobs)) in enumerate(zip(self._beams, candidates, strict=True))
            for rank, logprob in enumerate(logprobs)
            if logprob > float("-inf")  # grammars and bans may leave fewer tokens than are asked for
        ]
        everyone.sort(key=lambda c: (-c.score, c.source, c.rank))
        return everyone[: self._num_considered]

    def _stopped_by(self, token_id: int, source: int) -> bool:
        """Return whether a token ends the beam at place `source`."""
        return token_id in self._stop_token_ids or self._stop_state(self._beams[source], token_id) is None

    def _stop_state(self, beam: _Beam, token_id: int) -> int | None:
        """Return how near a beam's text comes to a stop string with a token; None if the string is complete."""
        if self._stops is None or self._num_tokens <= self._min_tokens:
            return 0
        return self._stops.after(beam.stop_state, token_id)

    def _extended(self, continuation: _Continuation, candidates: Sequence[Candidates]) -> _Beam:
        score, source, rank = continuation
        beam, (token_ids, logprobs) = self._beams[source], candidates[source]
        entries = beam.logprobs
        if self._num_top_logprobs is not None:
            top = tuple(zip(token_ids, logprobs, strict=True))[: self._num_top_logprobs]
            entries = (*entries, TokenLogprobs(token_ids[rank], logprobs[rank], rank + 1, top))
        stop_state = self._stop_state(beam, token_ids[rank]) or 0  # one that has ended needs none
        return _Beam((*beam.token_ids, token_ids[rank]), score, entries, stop_state)

    def _keep(self, beam: _Beam, stopped: bool) -> None:
        """Take in what has ended, if it is good enough."""
        score = beam.score / len(beam.token_ids) ** self._length_penalty
        entries = None if self._num_top_logprobs is None else beam.logprobs
        stop_token_id = beam.token_ids[-1] if beam.token_ids[-1] in self._stop_token_ids else None
        self.hypotheses.append(Hypothesis(beam.token_ids, score, stopped, stop_token_id, entries))
        self.hypotheses.sort(key=lambda h: -h.score)
        del self.hypotheses[self._width :]

    def _cannot_improve(self) -> bool:
        if len(self.hypotheses) < self._width:
            return False
        if self._early_stopping is True:
            return True
        # With a reward for length, a beam could at best keep its sum of log-probabilities up to the limit.
        far = self._early_stopping == "never" and self._length_penalty > 0
        length = self._max_num_tokens if far else self._num_tokens
        reachable: float = max(beam.score for beam in self._beams) / length**self._length_penalty
        return reachable <= self.hypotheses[-1].score


def _placed(continuations: Sequence[_Continuation], num_places: int) -> list[_Continuation | None]:
    """Give each continuation a place: the best of a beam its own, others what is free."""
    places: list[_Continuation | None] = [None] * num_places
    moving = []
    for continuation in continuations:
        if places[continuation.source] is None:
            places[continuation.source] = continuation
        else:
            moving.append(continuation)
    moving.reverse()  # the best one is taken first, from the end
    for place, holder in enumerate(places):
        if holder is None and moving:
            places[place] = moving.pop()
    return places + moving[::-1]
