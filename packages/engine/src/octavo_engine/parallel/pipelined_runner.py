"""PipelinedRunner: begins steps on the stages of a model before earlier ones are finished on the last of them."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import Any

import torch

from octavo_engine.batch import CachedRow, ModelOutput, NewRow, ScheduledBatch
from octavo_engine.errors import WorkerLost
from octavo_engine.executor.base import Pending
from octavo_engine.executor.inline import Done
from octavo_engine.models.registry import Model
from octavo_engine.overlap import OverlapStats
from octavo_engine.parallel.leader import LeadingStorage, PipelinedModel
from octavo_engine.runner.broken_rows import BrokenRows, Kept
from octavo_engine.runner.model_runner import ModelRunner, RaggedStep
from octavo_engine.runner.step_rows import StepRows
from octavo_kvcache.storage import KVStorage


@dataclass(slots=True, eq=False)
class _Begun:
    """A step on its way through the stages, or its outcome once somebody asked for it or for that of a later one.

    `ragged` has its input in memory of its own. `rows` are those that take part, `drawing` those that a token will be
    drawn for. `is_broken` if an earlier step of some of its sequences failed after it began.
    """

    runner: PipelinedRunner
    kept: Kept
    ragged: RaggedStep
    rows: frozenset[int]
    drawing: frozenset[int]
    is_broken: bool = False
    outcome: ModelOutput | Exception | None = None

    def result(self) -> ModelOutput:
        """Finish the step and return its output; raises what the step raised."""
        while self.outcome is None:
            self.runner.finish_oldest()
        return Done(self.outcome).result()


class PipelinedRunner(ModelRunner):
    """A ModelRunner whose model is shared out among stages, of which this process has a part of the last.

    A step begins on the first stage when it is launched. Its part on the last stage is computed, and its tokens are
    drawn, when it is the oldest one and its result is asked for: meanwhile the other stages compute the steps that were
    launched after it. What a step needs must be known when it begins, so a row whose token is still to be drawn makes
    it wait for the steps before it, as does one that changes hands; `overlap` counts those.

    Args:
        max_in_flight: steps that may be launched before the oldest one's result is read; at least 1.
    """

    model: PipelinedModel
    storage: LeadingStorage

    def __init__(self, model: Model, storage: KVStorage, *, max_in_flight: int, **options: Any) -> None:
        assert isinstance(model, PipelinedModel), "the model has no stages"
        assert isinstance(storage, LeadingStorage), "the other ranks would have no blocks"
        super().__init__(model, storage, jumps_ahead=False, **options)
        self.max_in_flight = max_in_flight
        self._begun: deque[_Begun] = deque()
        self._broken = BrokenRows()
        self._num_overlapped = 0
        self._num_waited: Counter[str] = Counter()

    @property
    def overlap(self) -> OverlapStats:
        """Which steps began beside others, and which had to wait for these."""
        return OverlapStats(self._num_overlapped, dict(self._num_waited))

    def execute(self, batch: ScheduledBatch) -> ModelOutput:
        """Run one step to its end."""
        return self.launch(batch).result()

    def launch(self, batch: ScheduledBatch) -> Pending:
        """Begin a step; what it raises is kept until its result is asked for."""
        if self._begun and self._must_wait(batch):
            self._num_waited["rows"] += 1
            while self._begun:
                self.finish_oldest()
        while len(self._begun) >= self.max_in_flight:
            self.finish_oldest()
        kept = self._broken.leave_out(batch)
        try:
            return self._begin(kept)
        except BaseException as error:
            self._broken.add(kept.batch.rows)
            if not isinstance(error, Exception):  # an interrupt is the caller's
                raise
            return Done(error)

    def forget_steps(self, error: WorkerLost) -> None:
        """Let all steps on their way fail: the ranks that had them are gone."""
        for step in self._begun:
            step.outcome = error
        self._begun.clear()

    def _must_wait(self, batch: ScheduledBatch) -> bool:
        """Return whether steps on their way have rows that a batch cannot be computed or changed without."""
        changing = {*batch.finished, *(new.row for new in batch.new)}
        changing.update(row for move in batch.moves for row in (move.row, move.source) if row is not None)
        computing = {cached.row for cached in batch.cached}
        return not all(step.rows.isdisjoint(changing) and step.drawing.isdisjoint(computing) for step in self._begun)

    def _begin(self, kept: Kept) -> Pending:
        batch = kept.batch
        self._update(replace(batch, copies=()))
        self.storage.apply_in_earlier_stages(batch.copies)
        if not batch.num_rows:
            while self._begun:
                self.finish_oldest()
            self.storage.apply_in_last_stage(batch.copies)
            return Done(kept.widen(ModelOutput(token_ids=())))
        ragged = self._build(StepRows.of(batch))
        own_input = self.model.begin_step(ragged.model_input)
        every: tuple[NewRow | CachedRow, ...] = (*batch.new, *batch.cached)
        drawing = frozenset(row.row for row in every if row.samples)
        step = _Begun(self, kept, ragged._replace(model_input=own_input), frozenset(batch.rows), drawing)
        self._num_overlapped += bool(self._begun)
        self._begun.append(step)
        return step

    def finish_oldest(self) -> None:
        """Compute the last stage's part of the oldest step, draw, and keep its outcome."""
        step = self._begun.popleft()
        try:
            step.outcome = self._finish(step)
        except Exception as error:
            self._fail(step, error)
        except BaseException:
            self._fail(step, WorkerLost("rank 0 was interrupted in the middle of a step"))
            raise

    def _fail(self, step: _Begun, error: Exception) -> None:
        step.outcome = error
        self._broken.add(step.rows)
        for later in self._begun:
            later.is_broken |= not step.rows.isdisjoint(later.rows)

    @torch.inference_mode()
    def _finish(self, step: _Begun) -> ModelOutput:
        self.storage.apply_in_last_stage(step.kept.batch.copies)
        hidden = self.model.finish_step(step.ragged.model_input)
        if step.is_broken:
            raise RuntimeError("an earlier step of some of its sequences failed")
        return step.kept.widen(self._read(step.ragged, hidden))
