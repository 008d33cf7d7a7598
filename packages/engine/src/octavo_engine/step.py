"""One step: the batch under construction, and what is remembered of it until its answer comes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from octavo_engine.batch import AdapterSlot, CachedRow, NewRow, RowMove, ScheduledBatch
from octavo_engine.sequence import Sequence
from octavo_kvcache import UNCHANGED, Allocation, BlockCopy


class ScheduledSequence(NamedTuple):
    """One row of a step in flight: enough to read its answer.

    `epoch` is the sequence's at the time. `num_computed_tokens` is what it will be once the step has ended.
    """

    sequence: Sequence
    epoch: int
    num_computed_tokens: int
    samples: bool


class StepBuilder:
    """Collects the rows of one step; the scheduler fills one per step.

    Args:
        step_id: of the batch.
        budget: tokens that may be scheduled.
        copies: those that wait for a batch, to which more are added; the batch takes them along in this order.

    Attributes:
        step_id: of the batch.
        budget: tokens that may still be scheduled.
        short_of_blocks: whether some running sequence found too few blocks.
    """

    def __init__(self, step_id: int, budget: int, copies: list[BlockCopy]) -> None:
        self.step_id = step_id
        self.budget = budget
        self.short_of_blocks = False
        self._new: list[NewRow] = []
        self._cached: list[CachedRow] = []
        self._new_sequences: list[ScheduledSequence] = []
        self._cached_sequences: list[ScheduledSequence] = []
        self._copies = copies
        self._moves: list[RowMove] = []

    def __bool__(self) -> bool:
        return bool(self._cached or self._new)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.last_step_id == self.step_id

    @property
    def sequences(self) -> list[ScheduledSequence]:
        """The rows in the batch's order."""
        return self._new_sequences + self._cached_sequences

    def add_cached(self, sequence: Sequence, num_new: int, allocation: Allocation) -> bool:
        """Schedule tokens of a sequence that the runner knows; True if the step draws a token for it."""
        row, start = sequence.row, sequence.num_computed_tokens
        assert row is not None
        samples = self._advance(sequence, num_new)
        if allocation is not UNCHANGED:
            self._copies += allocation.copies
        self._cached.append(CachedRow(row, start, num_new, samples, allocation.updates))
        self._cached_sequences.append(ScheduledSequence(sequence, sequence.epoch, start + num_new, samples))
        return samples

    def add_new(
        self, sequence: Sequence, num_new: int, allocation: Allocation, block_ids: tuple[list[int], ...]
    ) -> bool:
        """Schedule tokens of a sequence that enters the runner; True if the step draws a token for it."""
        start = sequence.num_computed_tokens
        samples = self._advance(sequence, num_new)
        self._copies += allocation.copies
        self._new.append(_new_row(sequence, start, num_new, samples, block_ids))
        self._new_sequences.append(_scheduled(sequence, samples))
        return samples

    def add_fork(self, child: Sequence, parent_row: int, block_ids: tuple[list[int], ...]) -> None:
        """Add a sequence that draws its first token from the logits of its parent's row."""
        child.last_step_id = self.step_id
        self._new.append(_new_row(child, child.num_computed_tokens, 0, True, block_ids, fork_of=parent_row))
        self._new_sequences.append(_scheduled(child, samples=True))

    def add_moves(self, moves: Iterable[RowMove]) -> None:
        """Let rows take over what beams made of them."""
        self._moves += moves

    def batch(self, finished: tuple[int, ...]) -> ScheduledBatch:
        """Return the finished batch."""
        copies = tuple(self._copies)
        self._copies.clear()
        return ScheduledBatch(
            step_id=self.step_id,
            new=tuple(self._new),
            cached=tuple(self._cached),
            finished=finished,
            copies=copies,
            moves=tuple(self._moves),
        )

    def _advance(self, sequence: Sequence, num_new: int) -> bool:
        """Count tokens as computed; True if the step reaches the end of the sequence and draws a token."""
        self.budget -= num_new
        sequence.last_step_id = self.step_id
        stop = sequence.num_computed_tokens + num_new
        samples = stop == sequence.num_tokens
        sequence.num_computed_tokens = stop
        sequence.num_placeholders += samples
        return samples


def _scheduled(sequence: Sequence, samples: bool) -> ScheduledSequence:
    return ScheduledSequence(sequence, sequence.epoch, sequence.num_computed_tokens, samples)


def _new_row(
    sequence: Sequence,
    start: int,
    num_new: int,
    samples: bool,
    block_ids: tuple[list[int], ...],
    fork_of: int | None = None,
) -> NewRow:
    assert sequence.row is not None
    request, slot = sequence.request, sequence.adapter_slot
    return NewRow(
        row=sequence.row,
        token_ids=tuple(sequence.token_ids),
        num_prompt_tokens=sequence.num_prompt_tokens,
        sampling=request.sampling,
        seed=request.seed,
        sequence_index=sequence.index,
        stop_token_ids=sequence.stop_token_ids,
        block_ids=tuple(tuple(ids) for ids in block_ids),
        num_computed_tokens=start,
        num_scheduled_tokens=num_new,
        samples=samples,
        fork_of=fork_of,
        task=request.task,
        pooling=request.pooling,
        sampler_state=sequence.sampler_state,
        num_candidates=0 if sequence.beams is None else sequence.beams.search.num_candidates,
        adapter=None if slot is None else AdapterSlot(slot, sequence.adapter),
    )
