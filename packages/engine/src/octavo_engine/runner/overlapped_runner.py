"""OverlappedRunner: launches steps on a device without waiting for the results of those before."""

from __future__ import annotations

from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.batch import ModelOutput, ScheduledBatch
from octavo_engine.executor.base import Pending
from octavo_engine.executor.inline import Done
from octavo_engine.models.registry import Model
from octavo_engine.overlap import GraphStats, OverlapStats
from octavo_engine.runner.answer import Answer
from octavo_engine.runner.broken_rows import BrokenRows, Kept
from octavo_engine.runner.device import Device, Event
from octavo_engine.runner.device_draw import DeviceDraw
from octavo_engine.runner.device_inputs import DeviceInputs
from octavo_engine.runner.device_rows import DeviceRows
from octavo_engine.runner.graph_plan import GraphPlan, GraphShape
from octavo_engine.runner.graphs import Graphs
from octavo_engine.runner.model_runner import ModelRunner, caches_of
from octavo_engine.runner.parcel import Parcels, parcel_bytes
from octavo_engine.runner.results import Results
from octavo_engine.runner.row_deltas import RowDelta, RowDeltas
from octavo_engine.runner.row_state import RowState
from octavo_engine.runner.rules.base import LogitChange
from octavo_engine.runner.sampler import Drawn
from octavo_engine.runner.step_plan import Draws, Planned, StepPlan, StepSize, plan_step
from octavo_engine.runner.step_rows import StepRows
from octavo_kvcache.storage import KVStorage


class _Work(NamedTuple):
    """A step as the device has it.

    Attributes:
        plan: of the step.
        delta: what it is told of its rows first; None if that is nothing.
        size: of the step.
        draws: whether it draws.
        best: whether every draw is the plain arg-max.
        changes: what is done to the logits before.
    """

    plan: StepPlan[Tensor]
    delta: RowDelta[Tensor] | None
    size: StepSize
    draws: bool
    best: bool
    changes: tuple[LogitChange, ...]


@dataclass(slots=True, eq=False)
class _Launched:
    """A step in flight, or its outcome once somebody asked for it or for that of a later one."""

    runner: OverlappedRunner
    kept: Kept
    event: Event
    slot: int
    draws: Draws
    changed: bool
    tenures: NDArray[np.int64]
    outcome: ModelOutput | Exception | None = None

    def result(self) -> ModelOutput:
        """Wait for the step and return its output; raises what the step raised."""
        if self.outcome is None:
            self.runner.read(self)
        assert self.outcome is not None
        return Done(self.outcome).result()


class OverlappedRunner(ModelRunner):
    """A ModelRunner that launches steps ahead of their results.

    The rows live on the device, which makes a step's input out of them and lets them go on by what it computed and
    drew. It is sent what the host alone knows, prompts, block tables and who takes part, and of that what has changed.
    The host sees a drawn token once its copy has come, when the step is read. A step with a row that cannot do without
    the host first waits for all steps before it, has its whole input from the host, and is over when `launch` returns:
    `overlap` counts those, and says what made them wait.

    Args:
        gpu: what computes; its memory is that of `device`.
        max_in_flight: steps that may be launched before the oldest one's result is read; at least 1.
        graphs: which steps are captured and replayed; None runs all of them op by op.
    """

    def __init__(
        self,
        model: Model,
        storage: KVStorage,
        *,
        gpu: Device,
        max_in_flight: int = 2,
        graphs: GraphPlan | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, storage, jumps_ahead=False, **options)
        self.max_in_flight = max_in_flight
        self._gpu = gpu
        kv_layers, num_groups = caches_of(model, storage)
        max_num_seqs, max_num_blocks = self._rows.block_tables[0].shape
        max_num_tokens: int = options["max_num_batched_tokens"]
        sizes: dict[str, Any] = {
            "max_num_blocks": max_num_blocks,
            "num_groups": num_groups,
            "block_size": storage.block_size,
            "device": self.device,
        }
        self._step_inputs = DeviceInputs(
            max_num_tokens=max_num_tokens, max_num_seqs=max_num_seqs, kv_layers=kv_layers, **sizes
        )
        self._device_rows = DeviceRows(max_num_seqs, **sizes)
        self._deltas = RowDeltas(max_num_seqs)
        self._sent_rows: NDArray[np.int64] | None = None  # which the last step's plan left on the device
        num_bytes = _largest_parcel(max_num_tokens, max_num_seqs, max_num_blocks, num_groups)
        self._parcels = Parcels(gpu, self.device, num_bytes=num_bytes, num_slots=max_in_flight)
        self._results = Results(gpu, self.device, max_num_draws=max_num_seqs, num_slots=max_in_flight)
        self._state = RowState(max_num_seqs)
        self._graphs = None if graphs is None else Graphs(gpu, graphs)
        self._broken = BrokenRows()
        self._in_flight: deque[_Launched] = deque()
        self._next_slot = 0
        self._num_overlapped = 0
        self._num_waited: Counter[str] = Counter()

    @property
    def overlap(self) -> OverlapStats:
        """Which steps did not wait for the ones before."""
        graphs = GraphStats() if self._graphs is None else self._graphs.stats
        return OverlapStats(self._num_overlapped, dict(self._num_waited), graphs)

    def execute(self, batch: ScheduledBatch) -> ModelOutput:
        """Run one step to its end."""
        return self.launch(batch).result()

    def launch(self, batch: ScheduledBatch) -> Pending:
        """Start a step. What it raises is kept until its result is asked for; its rows are then left out of others."""
        changing_hands = *batch.finished, *(new.row for new in batch.new)
        self._state.hand_over(changing_hands)
        self._deltas.hand_over(changing_hands)
        while len(self._in_flight) >= self.max_in_flight:
            self._read_oldest()
        kept = self._broken.leave_out(batch)
        try:
            return self._launch(kept)
        except BaseException as error:
            self._broken.add(kept.batch.rows)
            with suppress(Exception):  # the first error is the one that is reported
                self._gpu.record().wait()
            if not isinstance(error, Exception):  # an interrupt is the caller's
                raise
            return Done(error)

    def read(self, step: _Launched) -> None:
        """Wait for a step in flight, and take in what it and those before it drew."""
        while step.outcome is None:
            self._read_oldest()

    def _launch(self, kept: Kept) -> Pending:
        batch = kept.batch
        if any(new.adapter is not None for new in batch.new):  # weights may take the place of others
            self._read_all()
        if batch.copies:
            self._gpu.launch(partial(self.storage.apply, batch.copies))
        self._update(replace(batch, copies=()))
        self._deltas.note(batch)
        step = StepRows.of(batch) if batch.num_rows else None
        obstacle = None if step is None else self._obstacle(step)
        if step is None or obstacle is not None:
            self._num_waited.update(() if obstacle is None else (obstacle,))
            return Done(kept.widen(self._run_here(batch)))
        self._num_overlapped += 1
        return self._run_ahead(kept, step)

    def _obstacle(self, step: StepRows) -> str | None:
        """Return why a step cannot run without the host; None if it can."""
        rows = step.rows
        if self._rows.num_searching and self._rows.num_candidates[rows].any():
            return "beams"
        if self._rows.num_embedding and self._rows.embeds[rows].any():
            return "pooling"
        if self._rows.num_adapted and (self._rows.adapters[rows] >= 0).any():
            return "adapters"
        return "prompt_logprobs" if self._prompt_logprobs else self._sampling.obstacle(rows[step.samples])

    # -- with the host -------------------------------------------------------------------------------------------

    def _run_here(self, batch: ScheduledBatch) -> ModelOutput:
        """Run a step whose rows are up to date as a ModelRunner does, after all before it."""
        self._read_all()
        outputs: list[ModelOutput] = []

        def work() -> None:
            with self.forward.threads():
                outputs.append(self._compute(batch))

        self._gpu.launch(work)
        self._gpu.record().wait()
        return outputs[0]

    # -- without it ----------------------------------------------------------------------------------------------

    def _run_ahead(self, kept: Kept, step: StepRows) -> _Launched:
        """Launch a step whose rows are up to date."""
        self._inputs.decoding.forget()  # it would not see what enters a row now
        planned, slot = plan_step(step, self._rows, self._state), self._next_slot
        draws = planned.draws
        work = self._send(slot, step, planned)
        self._gpu.launch(partial(self._work, slot, work))
        changed = bool(work.changes)
        if work.draws:
            self._results.send(slot, len(draws.rows), changed=changed)
        tenures = self._state.tenures[draws.rows]
        launched = _Launched(self, kept, self._gpu.record(), slot, draws, changed, tenures)
        self._state.positions[draws.rows] = draws.positions
        self._in_flight.append(launched)
        self._next_slot = (slot + 1) % self.max_in_flight  # a failed step's slot is free
        return launched

    def _send(self, slot: int, step: StepRows, planned: Planned) -> _Work:
        """Send the device what it lacks for a step."""
        best = self._sampling.takes_best(planned.draws.rows.tolist())
        changes = () if best else self._sampling.changes(planned.draws.rows, planned.draws.positions)
        plan = planned.plan
        if self._sent_rows is not None and np.array_equal(self._sent_rows, planned.rows):
            plan = plan._replace(rows=None)
        self._sent_rows = None  # until it is known that the plan was sent
        delta = self._deltas.take(step, self._rows, self._sampling, planned.needs_token)
        arrays = [array for array in (*(delta or ()), *plan) if array is not None]
        tensors = iter(self._parcels.send(slot, arrays))
        told = None if delta is None else RowDelta(*(next(tensors) for _ in delta))
        there = StepPlan(*(None if array is None else next(tensors) for array in plan))
        self._sent_rows = planned.rows
        return _Work(there, told, planned.size, len(planned.draws.rows) > 0, best, changes)

    @torch.inference_mode()
    def _work(self, slot: int, work: _Work) -> None:
        """Compute a step on the device; what it draws goes to a slot of the results."""
        plan, size, rows = work.plan, work.size, self._device_rows
        with self.forward.threads():
            if work.delta is not None:
                rows.update(work.delta)
            exact = GraphShape(size.num_tokens, size.num_seqs, size.max_query_len)
            shape = None if self._graphs is None else self._graphs.fit(exact)
            tensors = self._step_inputs.tensors(shape or exact)
            rows.expand(plan, size, tensors)
            if self._graphs is not None and shape is not None:
                hidden = self._graphs(self.model, self._step_inputs.of_graph(shape), shape)
            else:
                hidden = self.model(self._step_inputs.of_step(exact, size.max_seq_len))
            if not work.draws:
                rows.advance(plan, size, tensors.seq_lens, None)
                return
            options = {} if work.best else rows.sampling(plan, size, tensors.seq_lens)
            num_logits_rows = size.num_seqs if plan.logits_seqs is None else len(plan.logits_seqs)
            draw = DeviceDraw(plan.shared, options, work.changes)
            drawn = draw(hidden[tensors.logits_indices[:num_logits_rows]], self.model.greedy, self._make_logits)
            rows.advance(plan, size, tensors.seq_lens, drawn.token_ids)
            self._results.put(slot, drawn)

    # -- reading -------------------------------------------------------------------------------------------------

    def _read_all(self) -> None:
        while self._in_flight:
            self._read_oldest()

    def _read_oldest(self) -> None:
        """Wait for the oldest step in flight; append what it drew to rows that are still its own, keep the answer."""
        step = self._in_flight[0]
        try:
            step.event.wait()
        except Exception as error:
            step.outcome = error
        self._in_flight.popleft()  # not before: a wait that was interrupted is made again
        rows, positions = step.draws.rows, step.draws.positions
        staying = self._state.tenures[rows] == step.tenures
        if step.outcome is not None:
            self._broken.add(rows[staying].tolist())
            self._sent_rows = None
            return
        drawn = self._results.drawn(step.slot, len(rows), changed=step.changed)
        answer = Answer(step.kept.batch.num_rows)
        if len(rows):
            answer.add_drawn(step.draws.places, drawn)
        step.outcome = step.kept.widen(answer.output())
        self._append(rows[staying], positions[staying], Drawn(drawn.token_ids[staying], drawn.sound[staying]))


def _largest_parcel(max_num_tokens: int, max_num_seqs: int, max_num_blocks: int, num_groups: int) -> int:
    """Return the bytes of the most that a step sends: of all rows what a `RowDelta` has, and a whole `StepPlan`."""
    seqs, bounds, tables = (max_num_seqs,), (max_num_seqs + 1,), max_num_seqs * num_groups
    shapes: list[tuple[tuple[int, ...], type[np.generic]]] = [(seqs, np.int32), (seqs, np.int32), (seqs, np.int64)]
    shapes += [((3, max_num_seqs), np.float32), ((3, max_num_seqs), np.int64)]
    shapes += [((tables, 3), np.int32), ((tables + 1,), np.int32), ((tables * max_num_blocks,), np.int32)]
    shapes += [(seqs, np.int32), (bounds, np.int32), ((max_num_tokens,), np.int32)]
    shapes += [(seqs, np.int32), (seqs, np.int32), (seqs, np.int64)]
    return parcel_bytes(shapes)
