"""The scheduler: which tokens the next step computes.

There is no prefill phase and no decode phase. Each sequence has known tokens and computed tokens; a step computes some
of the difference under one token budget, so that chunked prefill, decode and resuming after preemption are the same
thing (Orca, OSDI'22; vLLM, arXiv 2309.06180, section 4.5).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable

from octavo_engine.adapters.slots import AdapterSlots
from octavo_engine.admission import Admission
from octavo_engine.batch import ModelOutput, ScheduledBatch
from octavo_engine.beam_group import BeamGroup
from octavo_engine.beam_scheduler import BeamScheduler
from octavo_engine.block_finder import BlockFinder
from octavo_engine.branch import KnownTokens, Parent
from octavo_engine.preemption import PreemptionPolicy
from octavo_engine.residents import Residents
from octavo_engine.sequence import Sequence, SequenceStatus
from octavo_engine.step import StepBuilder
from octavo_engine.step_taker import StepTaker
from octavo_engine.timeline import RequestTimeline, WaitReason
from octavo_engine.types import FinishReason, Request, SequenceUpdate
from octavo_engine.waiting import QueuePolicy
from octavo_kvcache import Allocation, CacheManager


class Scheduler:
    """Continuous batching over a paged KV cache.

    Running sequences are served by priority (lower first), then arrival; who enters next is for the queue to say. When
    blocks run out, the last sequence in that order gives up its blocks and is computed again later; its tokens stay.
    Decoding rows are served before prompt chunks, so that a long prompt does not hold up running answers.

    Args:
        cache: the block manager; the scheduler is its only caller.
        max_num_seqs: rows in the runner.
        max_num_batched_tokens: token budget of a step.
        max_model_len: limit on prompt and output together, in tokens.
        eos_token_ids: tokens that end a sequence unless the request ignores them.
        max_num_kept: the most ended sequences that are kept for forks.
        clock: seconds, monotonic.
        preemption: chooses which preempted sequences keep their blocks on the host; None lets none.
        queue: the order of those that wait; None goes by priority and arrival.
        max_num_timelines: ended requests whose timelines are remembered; 0 notes none.
        adapters: which versions of adapters sequences use; None where there are none.
        num_shares: steps that are computed at the same time. With more than one, a sequence takes part in a step once
            the token of its last one has come, and a step takes its share of those that decode.
    """

    def __init__(
        self,
        cache: CacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
        max_num_kept: int = 64,
        clock: Callable[[], float] = time.monotonic,
        preemption: PreemptionPolicy | None = None,
        queue: QueuePolicy | None = None,
        max_num_timelines: int = 0,
        adapters: AdapterSlots | None = None,
        num_shares: int = 1,
    ) -> None:
        self.cache = cache
        self._residents = residents = Residents(
            cache,
            max_num_seqs=max_num_seqs,
            max_num_kept=max_num_kept,
            clock=clock,
            policy=preemption,
            queue=queue,
            max_num_timelines=max_num_timelines,
            adapters=adapters,
        )
        self._timelines = residents.timelines
        self.counters = residents.counters
        self.pins = residents.pins
        self.adapters = residents.adapters
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._num_shares = num_shares
        self._eos_token_ids = frozenset(eos_token_ids)
        self._clock = clock
        self.preemption = preemption
        self._swapper = residents.swapper
        self._waiting = residents.waiting
        self._running = residents.running
        self._rows = residents.rows
        self._in_flight = residents.in_flight
        self._admission = Admission(residents)
        self._blocks = BlockFinder(residents)
        self._beams = BeamScheduler(cache, self._blocks.find)
        self._taker = StepTaker(residents, clock, preemption)

    @property
    def num_running(self) -> int:
        """Sequences that hold a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a row or for blocks, preempted ones included."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """True until every sequence has ended and every step was read."""
        return bool(self._running or self._waiting or self._in_flight)

    @property
    def request_ids(self) -> list[str]:
        """The requests that have not ended."""
        return list(self._residents.by_request)

    def sequences(self, request_id: str) -> list[Sequence]:
        """Return the live sequences of a request in index order; empty if it is unknown or has ended."""
        return list(self._residents.by_request.get(request_id, ()))

    # -- what callers ask for ------------------------------------------------------------------------------------

    def add(self, request: Request, adapter: bytes = b"") -> None:
        """Queue a request; it has been validated against the limits. Forks for n > 1 come when its prompt ends.

        `adapter` is the version that the request's adapter has now, and keeps for it.
        """
        prompt = request.prompt_token_ids
        room = self._max_model_len - len(prompt)
        sampling = request.sampling
        limit = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        stop_token_ids = frozenset(sampling.stop_token_ids)
        sequence = Sequence(
            seq_id=self._residents.take_seq_id(),
            request=request,
            index=0,
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            max_num_output_tokens=1 if request.task == "embed" else limit,
            stop_token_ids=stop_token_ids if sampling.ignore_eos else stop_token_ids | self._eos_token_ids,
            num_forks_wanted=sampling.num_sequences - 1,
            adapter=adapter,
        )
        self.adapters.hold(adapter)
        if request.beams is not None:
            sequence.num_forks_wanted = request.beams.beam_width - 1
            sequence.beams = BeamGroup.begin(self._residents, request.beams, sequence)
        self._residents.by_request[request.request_id] = [sequence]
        self.counters.num_prompt_tokens += len(prompt)
        self._timelines.came(sequence, len(self._waiting))
        self._waiting.push(sequence)

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceUpdate]:
        """End a request, or one of its sequences, wherever it stands; unknown ids are ignored."""
        sequences = [s for s in self.sequences(request_id) if index is None or s.index == index]
        if index is not None:  # a stop string ended it, which only the front end sees
            for sequence in sequences:
                if sequence.request.keep:
                    self._residents.kept.add(sequence)
        return self._taker.end_all(sequences, FinishReason.ABORT)

    def release(self, request_id: str) -> bool:
        """Drop what is kept of an ended request and free its blocks at once; False if nothing is."""
        return self._residents.kept.release(request_id)

    def known_tokens(self, parent: Parent) -> KnownTokens | None:
        """Return the tokens of a sequence that runs, waits or is kept; None if it does none of these."""
        return self._residents.known_tokens(parent)

    def timeline(self, request_id: str) -> RequestTimeline | None:
        """Return what has happened to a request; None if it is unknown, or ended too long ago."""
        return self._timelines.get(request_id, self.sequences(request_id))

    def forget_content(self, root: bytes | None = None) -> None:
        """Forget all keys and values, since nothing runs and their memory or the weights go; kept tokens stay.

        With a `root`, what is cached from now on depends on it.
        """
        assert not self.has_work
        while self._residents.kept.give_up_blocks():
            pass
        self._rows.take_finished()  # the runner goes too
        self.adapters.reset()
        self.pins.reset(root)

    def schedule(self) -> ScheduledBatch | None:
        """Choose the next step; None if nothing can be computed before a step in flight ends."""
        step = StepBuilder(self._swapper.step_id, self._max_num_batched_tokens, self._swapper.copies)
        self._schedule_running(step)
        held_up = WaitReason.BLOCKS if step.short_of_blocks else self._admit(step)
        if self._waiting:
            self.counters.num_held_up[held_up.value] += 1
            self._timelines.held_up(held_up)
        if not step:
            return None
        self._swapper.step_id += 1
        self._in_flight.append((step.step_id, step.sequences))
        self.counters.num_steps += 1
        self.counters.sum_waste += self.cache.waste
        if self.preemption is not None:
            num_tokens = self._max_num_batched_tokens - step.budget
            self.preemption.begin_step(num_tokens, len(step.sequences), self._clock())
        return step.batch(self._rows.take_finished())

    def update(self, batch: ScheduledBatch, output: ModelOutput) -> list[SequenceUpdate]:
        """Take in the answer to the oldest step in flight: append, finish, free, report."""
        return self._taker.take(batch, output)

    def fail(self, batch: ScheduledBatch, reason: str) -> list[SequenceUpdate]:
        """Take in that the oldest step in flight could not be run: its sequences end with an error."""
        rows = self._taker.end_step(batch)
        updates = self._taker.end_all([row.sequence for row in rows], FinishReason.ERROR, reason)
        self._residents.distrust_copies(batch.step_id)
        return updates

    def start_over(
        self, batches: Collection[ScheduledBatch], reason: str, *, ends_all: bool = False
    ) -> list[SequenceUpdate]:
        """Take in that all steps in flight were lost, and with them the keys and values of all tokens.

        Everything is computed again from its tokens, but for sequences that meet this for the second time, of these
        steps or, where none was in flight, of all that run: these end with an error, lest one that brings the model
        down does it for ever. `ends_all`: they end so the first time, since nobody knows when the model can be computed
        again. Those that wait go on waiting.
        """
        sequences = self._taker.take_back(batches)
        updates = self._taker.end_all(
            [s for s in sequences if ends_all or s.num_losses > 1], FinishReason.ERROR, reason
        )
        self._residents.start_over()
        return updates

    # -- choosing a step -----------------------------------------------------------------------------------------

    def _schedule_running(self, step: StepBuilder) -> None:
        """Let running sequences go on, in order: first those that decode, then prompts in chunks."""
        prompts = []
        last_budget = step.budget - -(-len(self._running) // self._num_shares)
        for sequence in self._running.copy():
            num_uncomputed = sequence.num_uncomputed_tokens
            if num_uncomputed == 1:
                if self._num_shares == 1 or (step.budget > last_budget and not sequence.num_placeholders):
                    self._continue(step, sequence, 1)
            elif num_uncomputed:
                prompts.append(sequence)
        for sequence in prompts:
            before = sequence.num_computed_tokens
            self._continue(step, sequence, sequence.num_uncomputed_tokens)
            if sequence in step:
                self._timelines.computes(sequence, sequence.num_computed_tokens - before, step.step_id)

    def _continue(self, step: StepBuilder, sequence: Sequence, num_wanted: int) -> None:
        """Schedule up to `num_wanted` tokens of a running sequence; it may have been preempted meanwhile."""
        num_new = min(num_wanted, step.budget)
        if num_new == 0 or sequence.status is not SequenceStatus.RUNNING:
            return
        if sequence.beams is not None:
            if sequence is sequence.beams.leader:
                self._beams.go_on(step, sequence.beams)
            return
        allocation = self._blocks.allocate(step, sequence, num_new)
        if allocation is not None and step.add_cached(sequence, num_new, allocation) and sequence.num_forks_wanted:
            self._fork(step, sequence)

    def _admit(self, step: StepBuilder) -> WaitReason:
        """Let waiting sequences in, in order, while there are rows, blocks and budget; return what there is none of."""
        while step.budget > 0 and (sequence := self._waiting.first()) is not None:
            if sequence.num_rows > self._rows.num_available:
                return WaitReason.ROWS
            if sequence.num_placeholders:
                return WaitReason.STEP
            if not self.adapters.has_room(sequence.adapter):
                return WaitReason.ADAPTERS
            enter = self._bring_back if self._swapper.has(sequence) else self._bring_in
            if not enter(step, sequence):
                if not self.cache.stats().num_parked and self._residents.kept.give_up_blocks():
                    continue
                return WaitReason.BLOCKS
        return WaitReason.TOKEN_BUDGET

    def _bring_in(self, step: StepBuilder, sequence: Sequence) -> bool:
        """Let the first waiting sequence run, which has no blocks; False if there are too few."""
        cached = self._admission.match(sequence)
        num_new = min(sequence.num_tokens_to_enter - cached.total, step.budget)
        allocation = self._admission.try_allocate(sequence, cached.total, num_new)
        if allocation is None:
            self.cache.free(sequence.seq_id)
            return False
        # What was computed before a preemption was counted then.
        self._waiting.pop(0 if sequence.num_preemptions else sequence.num_tokens_to_enter - cached.total)
        self._residents.enter(sequence, cached)
        self._add_new(step, sequence, num_new, allocation)
        return True

    def _bring_back(self, step: StepBuilder, sequence: Sequence) -> bool:
        """Let the first waiting sequence go on, with all beams of its group; their blocks are on the host."""
        start, group = sequence.num_computed_tokens, sequence.beams
        num_new = min(sequence.num_tokens - start, step.budget)
        if not self._admission.bring_back([sequence] if group is None else group.members, num_new):
            return False
        if group is not None:
            self._waiting.pop(0)
            group.resume()
            self._beams.go_on(step, group)
            return True
        allocation = self._admission.try_allocate(sequence, start, num_new)
        if allocation is None:
            self._swapper.put_back(sequence)
            return False
        self._waiting.pop(0)
        self._residents.resume(sequence)
        self._add_new(step, sequence, num_new, allocation)
        return True

    def _add_new(self, step: StepBuilder, sequence: Sequence, num_new: int, allocation: Allocation) -> None:
        samples = step.add_new(sequence, num_new, allocation, self.cache.block_ids(sequence.seq_id))
        self._timelines.computes(sequence, num_new, step.step_id, resumes=sequence.num_preemptions > 0)
        if samples and sequence.num_forks_wanted and sequence.beams is None:
            self._fork(step, sequence)

    def _fork(self, step: StepBuilder, parent: Sequence) -> None:
        """Make the other samples of a request whose prompt ends in this step; they share all its blocks."""
        assert parent.row is not None
        num_forks, parent.num_forks_wanted = parent.num_forks_wanted, 0
        self._rows.unreserve(num_forks)
        for index in range(1, num_forks + 1):
            child = self._residents.add_fork(parent, index)
            child.num_placeholders = 1
            step.add_fork(child, parent.row, self.cache.block_ids(child.seq_id))
