"""SamplingRows: how each running sequence draws its tokens, as arrays; SamplingBatch: the part that one step needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from octavo_engine.batch import NewRow, RowMove
from octavo_engine.runner.logprobs import WantedLogprobs
from octavo_engine.runner.rules.base import LogitChange
from octavo_engine.runner.rules.distribution import MIN_TEMPERATURE, filters_whole_rows
from octavo_engine.runner.rules.grammar import GrammarRule, Trial
from octavo_engine.runner.rules.mirostat import MirostatRule
from octavo_engine.runner.rules.rules import make_rules
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.structured.compiler import GrammarCompiler


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How the rows of some logits are drawn; every array has one entry per row and stays on the host.

    Attributes:
        temperature: float32; 0 takes the arg-max.
        top_k: int64; 0 keeps all.
        top_p: float32.
        min_p: float32.
        seeds: int64.
        sequence_index: int64.
        positions: int64, position of the token that is drawn.
        logprobs: which are wanted; None if none are.
        changes: what is done to the logits before the draw, in order.
        trial: the rows whose tokens are tried on grammars after the draw; None if there are none.
    """

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    seeds: NDArray[np.int64]
    sequence_index: NDArray[np.int64]
    positions: NDArray[np.int64]
    logprobs: WantedLogprobs | None = None
    changes: tuple[LogitChange, ...] = ()
    trial: Trial | None = None

    @property
    def is_plain(self) -> bool:
        """Whether tokens alone are wanted of the logits, and nothing changes these or leaves some out."""
        if self.logprobs is not None or self.changes or self.trial is not None:
            return False
        return not self.top_k.any() and not self.min_p.any() and bool((self.top_p >= 1.0).all())

    def drawing(self, places: NDArray[np.int64]) -> SamplingBatch:
        """Return how some of the rows are drawn, without what comes before and after the draw."""
        return SamplingBatch(
            temperature=self.temperature[places],
            top_k=self.top_k[places],
            top_p=self.top_p[places],
            min_p=self.min_p[places],
            seeds=self.seeds[places],
            sequence_index=self.sequence_index[places],
            positions=self.positions[places],
        )


class SamplingRows:
    """The sampling parameters of the running sequences, and the rules that change their logits.

    Only the ModelRunner writes it.

    Args:
        token_ids: [max_num_rows, max_num_tokens + 1] int32, the known tokens of every row; not modified.
        vocab_size: columns of the logits.
        device: where the logits are.
        grammars: makes the matchers of rows with a constraint.
    """

    def __init__(
        self,
        token_ids: NDArray[np.int32],
        vocab_size: int,
        device: torch.device,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        max_num_rows = len(token_ids)
        self._vocab_size = vocab_size
        self._special: set[int] = set()  # rows that want more than the arg-max of the logits as they are
        self._may_jump: set[int] = set()  # rows whose forced tokens need no draw
        self._fractions = np.zeros((3, max_num_rows), np.float32)  # temperature, top_p, min_p
        self._integers = np.zeros((3, max_num_rows), np.int64)  # top_k, seed, sequence index
        self._wants_logprobs = np.zeros(max_num_rows, np.bool_)
        self._sampling: dict[int, SamplingParams] = {}  # of the rows that want log-probabilities
        self._mirostat = MirostatRule()
        self._grammar = GrammarRule(max_num_rows, vocab_size, grammars)
        self._rules = make_rules(token_ids, vocab_size, device, self._mirostat, self._grammar)

    def add(self, new: NewRow) -> None:
        """Fill a row, whatever it held before."""
        row, sampling = new.row, new.sampling
        temperature = 0.0 if sampling.greedy else max(sampling.temperature, MIN_TEMPERATURE)
        top_k, top_p, min_p = sampling.top_k, sampling.top_p, sampling.min_p
        if filters_whole_rows(sampling):  # a rule does
            top_k, top_p, min_p = 0, 1.0, 0.0
        self._fractions[:, row] = temperature, top_p, min_p
        self._integers[:, row] = top_k, new.seed, new.sequence_index
        self._wants_logprobs[row] = sampling.wants_logprobs
        if sampling.wants_logprobs:
            self._sampling[row] = sampling
        ruled = self._rules.add(new)
        if _may_jump(sampling):
            self._may_jump.add(row)
        else:
            self._may_jump.discard(row)
        if sampling.greedy and not sampling.wants_logprobs and not ruled:
            self._special.discard(row)
        else:
            self._special.add(row)

    def release(self, rows: Iterable[int]) -> None:
        """Forget what rows whose sequences have left wanted."""
        left = self._special.intersection(rows)
        self._special -= left
        self._may_jump -= left
        self._rules.release(left)
        self._mirostat.release(left)

    def takes_best(self, rows: Iterable[int]) -> bool:
        """Return whether all of some rows take the plain arg-max of their logits."""
        return not self._special or self._special.isdisjoint(rows)

    def obstacle(self, rows: NDArray[np.int64]) -> str | None:
        """Return why the host must see a draw of some rows before their next one can begin; None if it need not."""
        if self.takes_best(rows.tolist()):
            return None
        if self._wants_logprobs[rows].any():
            return "logprobs"
        return "rules" if self._rules.follow_tokens(rows) else None

    def batch(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> SamplingBatch | None:
        """Collect what the next draw of some rows needs; None if all of them take the plain arg-max.

        Args:
            rows: [num_rows], the rows that draw.
            positions: [num_rows], the position of the token that each draws.
        """
        if self.takes_best(rows.tolist()):
            return None
        (temperature, top_p, min_p), (top_k, seeds, sequence_index) = self.parameters(rows)
        return SamplingBatch(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seeds=seeds,
            sequence_index=sequence_index,
            positions=positions,
            logprobs=self._wanted_logprobs(rows),
            changes=self._rules.of(rows, positions),
            trial=self._grammar.trial(rows),
        )

    def parameters(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return how some rows draw: [3, num_rows] temperature, top_p and min_p, and top_k, seed and sequence index."""
        return self._fractions.take(rows, axis=1), self._integers.take(rows, axis=1)

    def _wanted_logprobs(self, rows: NDArray[np.int64]) -> WantedLogprobs | None:
        places = np.flatnonzero(self._wants_logprobs[rows])
        if not len(places):
            return None
        wanting = [self._sampling[row] for row in rows[places].tolist()]
        return WantedLogprobs(
            places=places,
            num_top=[self._vocab_size if s.logprobs == -1 else s.logprobs or 0 for s in wanting],
            given=[tuple(s.logprob_token_ids) for s in wanting],
            processed=np.array([s.logprobs_mode == "processed" for s in wanting]),
            temperature=self._fractions[0, rows[places]],
        )

    def append(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Take in one drawn token for each of some different rows."""
        if self._special:
            self._rules.append(rows, token_ids)

    def move(self, moves: Sequence[RowMove]) -> None:
        """Let rows that search go on from others, each with a token that was chosen for it."""
        if self._special:
            self._special |= {move.row for move in moves if move.source in self._special}
            self._rules.move(moves)

    def changes(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> tuple[LogitChange, ...]:
        """Return what is done to some rows' logits, to the log-probabilities of those that search, for a token of each.

        Args:
            rows: [num_rows].
            positions: [num_rows], of these tokens.
        """
        return self._rules.of(rows, positions) if self._special else ()

    def forced(self, rows: NDArray[np.int64]) -> dict[int, list[int]]:
        """Return the tokens that must come next in some rows, by place; most rows have none.

        Rows that want log-probabilities, whose draws depend on those of earlier ones, or which ban tokens, draw them
        like any others.
        """
        if not self._may_jump:
            return {}
        jumping = [(place, row) for place, row in enumerate(rows.tolist()) if row in self._may_jump]
        return {place: token_ids for place, row in jumping if (token_ids := self._grammar.forced(row))}

    def states(self, rows: NDArray[np.int64]) -> dict[int, float]:
        """Return what the next draw of some rows depends on beside their tokens, by place; most rows have nothing."""
        return self._mirostat.states(rows)


def _may_jump(sampling: SamplingParams) -> bool:
    """Return whether tokens that a grammar forces need no draw, which could bring or refuse anything."""
    bans = sampling.allowed_token_ids is not None or sampling.bad_words_ids
    watched = sampling.wants_logprobs or sampling.mirostat_mode or bans
    return sampling.structured_outputs is not None and not watched
