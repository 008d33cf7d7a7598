"""OverlappedRunner: launches steps on a device without waiting for the results of those before."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
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
from octavo_engine.runner.decode_step import DecodeStep
from octavo_engine.runner.device import Device, Event
from octavo_engine.runner.device_draw import DeviceDraw, arrays_of, draw_of
from octavo_engine.runner.graph_plan import GraphPlan
from octavo_engine.runner.graphs import GraphInputs, Graphs
from octavo_engine.runner.input_builder import InputBuilder
from octavo_engine.runner.model_input import GroupInput, ModelInput
from octavo_engine.runner.model_runner import ModelRunner, caches_of
from octavo_engine.runner.parcel import Parcels, parcel_bytes
from octavo_engine.runner.results import Results
from octavo_engine.runner.row_state import RowState
from octavo_engine.runner.sampler import Drawn
from octavo_engine.runner.step_buffers import StepBuffers
from octavo_engine.runner.step_rows import StepRows
from octavo_kvcache.storage import KVStorage


class _Draws(NamedTuple):
    """What a step draws: places in its batch, rows, positions, which of the sources each goes by; one entry each."""

    places: NDArray[np.int64]
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    shared: NDArray[np.int64] | None = None


@dataclass(slots=True, eq=False)
class _Launched:
    """A step in flight, or its outcome once somebody asked for it or for that of a later one."""

    runner: OverlappedRunner
    kept: Kept
    event: Event
    slot: int
    draws: _Draws
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

    The token that a row drew last stays on the device, where the next step takes it from. The host sees it once its
    copy has come, when the step is read. A step with a row that cannot do without the host first waits for all steps
    before it, and is over when `launch` returns: `overlap` counts those, and says what made them wait.

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
        self._staging = InputBuilder(
            StepBuffers(
                max_num_tokens=max_num_tokens,
                max_num_seqs=max_num_seqs,
                max_num_blocks=max_num_blocks,
                num_groups=num_groups,
            ),
            kv_layers,
            block_size=storage.block_size,
            device=torch.device("cpu"),
        )
        num_bytes = _largest_parcel(max_num_tokens, max_num_seqs, max_num_blocks, num_groups)
        self._parcels = Parcels(gpu, self.device, num_bytes=num_bytes, num_slots=max_in_flight)
        self._results = Results(gpu, self.device, max_num_draws=max_num_seqs, num_slots=max_in_flight)
        self._state = RowState(max_num_seqs, self.device)
        self._graphs: Graphs | None = None
        if graphs is not None:
            inputs = GraphInputs(
                shapes=graphs.shapes,
                max_num_blocks=max_num_blocks,
                num_groups=num_groups,
                kv_layers=kv_layers,
                device=self.device,
            )
            self._graphs = Graphs(gpu, graphs, inputs)
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
        self._state.hand_over(batch.finished)
        self._state.hand_over(new.row for new in batch.new)
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
        self._staging.decoding.forget()  # it would not see what enters a row now
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
        staged, draws = self._stage(kept.batch, step)
        sampling = self._sampling.batch(draws.rows, draws.positions) if len(draws.rows) else None
        token_sources = np.full(len(staged.token_ids), -1, np.int64)
        computing = np.flatnonzero(step.num_scheduled_tokens)
        rows, last_positions = step.rows[computing], step.ends[computing] - 1
        on_device = self._state.on_device(rows, last_positions)
        token_sources[step.last_tokens(computing[on_device])] = rows[on_device]

        slot = self._next_slot
        arrays = [*_arrays_of(staged), token_sources, draws.rows, *arrays_of(sampling, draws.shared)]
        tensors = iter(self._parcels.send(slot, arrays))
        model_input = _on_device(staged, tensors)
        sources, drawing_rows = next(tensors), next(tensors)
        draw = draw_of(sampling, draws.shared, tensors)
        self._gpu.launch(partial(self._work, slot, model_input, sources, drawing_rows, draw))
        changed = bool(draw.changes)
        if len(draws.rows):
            self._results.send(slot, len(draws.rows), changed=changed)
        tenures = self._state.tenures[draws.rows]
        launched = _Launched(self, kept, self._gpu.record(), slot, draws, changed, tenures)
        self._state.positions[draws.rows] = draws.positions
        self._in_flight.append(launched)
        self._next_slot = (slot + 1) % self.max_in_flight  # a failed step's slot is free
        return launched

    def _stage(self, batch: ScheduledBatch, step: StepRows) -> tuple[ModelInput, _Draws]:
        """Make a step's input on the host, in which tokens that only the device knows are missing."""
        decoding = DecodeStep.of(batch)
        if decoding is not None:
            places = np.arange(len(step.rows))
            return self._staging.decode(decoding, self._rows), _Draws(places, step.rows, step.ends)
        places = np.flatnonzero(step.samples)
        sources, shared = step.sources[places], None
        if step.forks:  # one row of logits serves a parent and its forks
            sources, shared = np.unique(sources, return_inverse=True)
        staged = self._staging.build(step, self._rows, step.last_tokens(sources))
        return staged, _Draws(places, step.rows[places], step.ends[places], shared)

    @torch.inference_mode()
    def _work(
        self, slot: int, model_input: ModelInput, sources: Tensor, drawing_rows: Tensor, draw: DeviceDraw
    ) -> None:
        """Compute a step on the device, from tensors that lie there.

        Args:
            slot: where the draw goes.
            model_input: whose token_ids are completed.
            sources: [num_tokens] int64, the row whose last token each is; -1 where `model_input` has it.
            drawing_rows: [draws] int64.
            draw: how they draw.
        """
        with self.forward.threads():
            last_tokens = self._state.last_tokens[sources.clamp(min=0)]
            model_input.token_ids.copy_(torch.where(sources >= 0, last_tokens, model_input.token_ids))
            hidden = self.model(model_input) if self._graphs is None else self._graphs(self.model, model_input)
            if not len(drawing_rows):
                return
            drawn = draw(hidden[model_input.logits_indices], self.model.greedy, self._make_logits)
            self._state.last_tokens[drawing_rows] = drawn.token_ids
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
            return
        drawn = self._results.drawn(step.slot, len(rows), changed=step.changed)
        answer = Answer(step.kept.batch.num_rows)
        if len(rows):
            answer.add_drawn(step.draws.places, drawn)
        step.outcome = step.kept.widen(answer.output())
        self._append(rows[staying], positions[staying], Drawn(drawn.token_ids[staying], drawn.sound[staying]))


def _arrays_of(model_input: ModelInput) -> list[NDArray[Any]]:
    """Return a step's arrays on the host, in the order of `_on_device`."""
    tensors = [
        model_input.token_ids,
        model_input.positions,
        model_input.query_start_loc,
        model_input.seq_lens,
        model_input.logits_indices,
        *(tensor for group in model_input.groups for tensor in group),
    ]
    return [tensor.numpy() for tensor in tensors]


def _on_device(staged: ModelInput, tensors: Iterator[Tensor]) -> ModelInput:
    """Return a step's input on the device, given its arrays there, which are taken from the front."""
    token_ids, positions, query_start_loc, seq_lens, logits_indices = (next(tensors) for _ in range(5))
    return ModelInput(
        token_ids=token_ids,
        positions=positions,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        max_query_len=staged.max_query_len,
        logits_indices=logits_indices,
        groups=tuple(GroupInput(next(tensors), next(tensors)) for _ in staged.groups),
        kv_layers=staged.kv_layers,
    )


def _largest_parcel(max_num_tokens: int, max_num_seqs: int, max_num_blocks: int, num_groups: int) -> int:
    """Return the bytes of the most that a step sends: per token, per sequence, and how each is drawn."""
    tokens, seqs = (max_num_tokens,), (max_num_seqs,)
    shapes: list[tuple[tuple[int, ...], type[np.generic]]] = [(tokens, np.int64)] * (3 + num_groups)
    shapes += [((max_num_seqs + 1,), np.int32), (seqs, np.int32)]
    shapes += [((max_num_seqs, max_num_blocks), np.int32)] * num_groups
    shapes += [(seqs, np.int64)] * 7  # logits, rows, sources, top_k, seeds, sequence indices, positions
    shapes += [(seqs, np.float32)] * 3  # temperature, top_p, min_p
    return parcel_bytes(shapes)
