"""An executor without a model, for tests of the scheduler and the server: exact about memory, free to answer late.

The fake model keeps a real paged memory with a host tier: each computed token is written into its slot, and the next
token is a function of the tokens read back through the row's block table. A wrong block id, a missed copy or a block
freed too early therefore changes the answer.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from octavo_engine.batch import CachedRow, ModelOutput, NewRow, RowMove, ScheduledBatch
from octavo_engine.overlap import OverlapStats
from octavo_kvcache import DEVICE

NextToken = Callable[[Sequence[int], int], int]
"""(all tokens of a sequence, sequence index) -> the token that follows."""


Candidates = Callable[[Sequence[int], int], tuple[list[int], list[float]]]
"""(all tokens of a sequence, how many) -> the likeliest next tokens, best first, and their log-probabilities."""


def hashed_candidates(vocab_size: int) -> Candidates:
    """Make a model for beams: a distribution over the vocabulary that depends on every token before."""

    def candidates(token_ids: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        text = ",".join(map(str, token_ids)).encode()
        draws = hashlib.shake_128(text).digest(2 * vocab_size)
        weights = [1 + int.from_bytes(draws[2 * i : 2 * i + 2], "little") for i in range(vocab_size)]
        logprobs = [math.log(weight / sum(weights)) for weight in weights]
        best = sorted(range(vocab_size), key=lambda token_id: -logprobs[token_id])[:count]
        return best, [logprobs[token_id] for token_id in best]

    return candidates


def hashed_next_token(vocab_size: int) -> NextToken:
    """Make a next-token function that depends on every token before it and on the sequence index."""

    def next_token(token_ids: Sequence[int], sequence_index: int) -> int:
        text = f"{sequence_index}:{','.join(map(str, token_ids))}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") % vocab_size

    return next_token


@dataclass(slots=True)
class _Row:
    token_ids: list[int]
    sequence_index: int
    block_ids: list[int]
    embeds: bool
    num_candidates: int


@dataclass(slots=True)
class _LateAnswer:
    answers: deque[ModelOutput | Exception]

    def result(self) -> ModelOutput:
        answer = self.answers.popleft()
        if isinstance(answer, Exception):
            raise answer
        return answer


@dataclass(slots=True)
class FakeExecutor:
    """Runs batches on a fake model with one KV group and answers `num_late` steps late.

    Attributes:
        num_late: steps that may be submitted beyond the one whose answer is awaited.
        next_token: the model.
        candidates: the model of rows that search.
        fail_steps: step ids that raise instead of answering.
    """

    block_size: int
    next_token: NextToken
    num_late: int = 0
    fail_steps: frozenset[int] = frozenset()
    candidates: Candidates = field(default_factory=lambda: hashed_candidates(64))
    batches: list[ScheduledBatch] = field(default_factory=list)
    _memory: dict[tuple[str, int], list[int | None]] = field(default_factory=dict)
    _rows: dict[int, _Row] = field(default_factory=dict)
    _broken: set[int] = field(default_factory=set)  # rows of a failed step, until they are released
    _answers: deque[ModelOutput | Exception] = field(default_factory=deque)

    @property
    def max_in_flight(self) -> int:
        """Steps that may be in flight."""
        return self.num_late + 1

    @property
    def overlap(self) -> OverlapStats:
        """Nothing: what is late here are answers."""
        return OverlapStats()

    def submit(self, batch: ScheduledBatch) -> _LateAnswer:
        """Run the step now, as a device in order would, and keep the answer for later."""
        self.batches.append(batch)
        if batch.step_id in self.fail_steps:
            self._release(batch)
            self._broken.update(row.row for row in batch.new)
            self._broken.update(row.row for row in batch.cached)
            self._answers.append(RuntimeError(f"step {batch.step_id} was told to fail"))
        else:
            self._answers.append(self._run(batch))
        return _LateAnswer(self._answers)

    def close(self) -> None:
        """Forget everything."""
        self._rows.clear()
        self._memory.clear()

    def _release(self, batch: ScheduledBatch) -> None:
        for row in batch.finished:
            self._rows.pop(row, None)  # absent if the step that brought it failed
            self._broken.discard(row)

    def _run(self, batch: ScheduledBatch) -> ModelOutput:
        self._release(batch)
        for copy in batch.copies:
            self._memory[copy.dst_tier, copy.dst] = list(self._block(copy.src, copy.src_tier))
        for new in batch.new:
            ids = list(new.block_ids[0])
            embeds = new.task == "embed"
            self._rows[new.row] = _Row(list(new.token_ids), new.sequence_index, ids, embeds, new.num_candidates)
        for move in batch.moves:
            self._move(move)
        for cached in batch.cached:
            for update in cached.block_updates[:1]:
                if cached.row in self._rows:
                    start = update.first_index
                    self._rows[cached.row].block_ids[start : start + len(update.block_ids)] = update.block_ids
        scheduled: list[NewRow | CachedRow] = [*batch.new, *batch.cached]
        errors = {place: "an earlier step failed" for place, row in enumerate(scheduled) if row.row in self._broken}
        for place, row in enumerate(scheduled):
            if place not in errors:
                self._write(self._rows[row.row], row)
        drawn: list[tuple[int, ...]] = [
            () if place in errors else self._draw(row) for place, row in enumerate(scheduled)
        ]
        for row, token_ids in zip(scheduled, drawn, strict=True):
            if row.row in self._rows:
                self._rows[row.row].token_ids.extend(token_ids)
        pooled: dict[int, tuple[float, ...]] = {
            place: (1.0,)
            for place, row in enumerate(scheduled)
            if place not in errors and row.samples and self._rows[row.row].embeds
        }
        candidates = {
            place: self.candidates(self._rows[row.row].token_ids, self._rows[row.row].num_candidates)
            for place, row in enumerate(scheduled)
            if place not in errors and row.samples and self._rows[row.row].num_candidates
        }
        return ModelOutput(token_ids=tuple(drawn), pooled=pooled, candidates=candidates, errors=errors)

    def _move(self, move: RowMove) -> None:
        if move.source is not None:
            source = self._rows[move.source]
            tokens, block_ids = source.token_ids[: move.position], list(source.block_ids)
            self._rows[move.row] = _Row(tokens, source.sequence_index, block_ids, False, source.num_candidates)
        row = self._rows[move.row]
        row.token_ids[move.position :] = [move.token_id]

    def _block(self, block_id: int, tier: str = DEVICE) -> list[int | None]:
        return self._memory.setdefault((tier, block_id), [None] * self.block_size)

    def _write(self, state: _Row, row: NewRow | CachedRow) -> None:
        for position in range(row.num_computed_tokens, row.num_computed_tokens + row.num_scheduled_tokens):
            block = self._block(state.block_ids[position // self.block_size])
            block[position % self.block_size] = state.token_ids[position]

    def _draw(self, row: NewRow | CachedRow) -> tuple[int, ...]:
        state = self._rows[row.row]
        if not row.samples or state.embeds:
            return ()
        length = row.num_computed_tokens + row.num_scheduled_tokens
        seen = [self._block(state.block_ids[p // self.block_size])[p % self.block_size] for p in range(length)]
        assert seen == state.token_ids[:length], f"row {row.row} reads other tokens from its blocks than were written"
        if state.num_candidates:
            return ()
        return (self.next_token(state.token_ids[:length], state.sequence_index),)
