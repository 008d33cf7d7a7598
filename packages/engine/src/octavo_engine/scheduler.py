"""The scheduler: which tokens the next step computes, and what a finished step means for each sequence.

There is no prefill phase and no decode phase. Each sequence has known tokens and computed tokens; a step computes some
of the difference under one token budget, so that chunked prefill, decode and resuming after preemption are the same
thing (Orca, OSDI'22; vLLM, arXiv 2309.06180, section 4.5).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping

from octavo_engine.adapters.slots import AdapterSlots
from octavo_engine.admission import Admission
from octavo_engine.batch import ModelOutput, ScheduledBatch
from octavo_engine.beam_group import BeamGroup
from octavo_engine.beam_scheduler import BeamScheduler
from octavo_engine.beam_search import Candidates
from octavo_engine.block_finder import BlockFinder
from octavo_engine.branch import KnownTokens, Parent
from octavo_engine.preemption import PreemptionPolicy
from octavo_engine.residents import Residents
from octavo_engine.sequence import Sequence, SequenceStatus
from octavo_engine.step import ScheduledSequence, StepBuilder
from octavo_engine.timeline import RequestTimeline, WaitReason
from octavo_engine.types import FinishReason, Request, SequenceUpdate, TokenLogprobs
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
        self._last_step: int | None = None  # in flight when an answer is taken in

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
        return self._end_all(sequences, FinishReason.ABORT)

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
        rows = self._end_step(batch)
        updates = []
        for place, (scheduled, token_ids) in enumerate(zip(rows, output.token_ids, strict=True)):
            update = self._update_row(scheduled, token_ids, place, output)
            if update is not None:
                if output.prompt_logprobs and place in output.prompt_logprobs:
                    update = update._replace(prompt_logprobs=output.prompt_logprobs[place])
                updates.append(update)
        if output.candidates:
            updates += self._advance_beams(rows, output.candidates)
        return updates

    def fail(self, batch: ScheduledBatch, reason: str) -> list[SequenceUpdate]:
        """Take in that the oldest step in flight could not be run: its sequences end with an error."""
        rows = self._end_step(batch)
        updates = self._end_all([row.sequence for row in rows], FinishReason.ERROR, reason)
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
        sequences = self._take_back(batches)
        updates = self._end_all([s for s in sequences if ends_all or s.num_losses > 1], FinishReason.ERROR, reason)
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

    # -- taking in a step ----------------------------------------------------------------------------------------

    def _end_step(self, batch: ScheduledBatch) -> list[ScheduledSequence]:
        step_id, rows = self._in_flight.popleft()
        assert step_id == batch.step_id, "steps are read in the order of submission"
        if self.preemption is not None:
            self.preemption.end_step(self._clock())
        self.cache.step_done(step_id)
        if self._timelines.steps:
            self._timelines.end_step(step_id)
        self._last_step = self._residents.last_step
        return rows

    def _take_back(self, batches: Collection[ScheduledBatch]) -> list[Sequence]:
        """End steps that have no answers, whose sequences go on; return these."""
        sequences: dict[Sequence, None] = dict.fromkeys(() if batches else self._running)
        for batch in batches:
            self.counters.num_lost_steps += 1
            for sequence, _, _, samples in self._end_step(batch):
                sequence.num_placeholders -= samples
                sequences[sequence] = None
        for sequence in sequences:
            sequence.num_losses += 1
        return list(sequences)

    def _update_row(
        self, scheduled: ScheduledSequence, token_ids: tuple[int, ...], place: int, output: ModelOutput
    ) -> SequenceUpdate | None:
        sequence, epoch, num_computed_tokens, samples = scheduled
        if sequence.status is SequenceStatus.FINISHED:  # it ended while this step was in flight
            return None
        if output.errors and place in output.errors:
            return self._end_all([sequence], FinishReason.ERROR, output.errors[place])[0]
        sequence.num_placeholders -= samples
        sequence.token_ids += token_ids
        if output.sampler_states and place in output.sampler_states:
            sequence.sampler_state = output.sampler_states[place]
        if epoch == sequence.epoch:
            self.cache.commit(sequence.seq_id, sequence.token_ids, num_computed_tokens, in_flight=self._last_step)
        if not token_ids:  # a part of a prompt, the end of one that is pooled, or a beam
            if not samples or output.pooled is None or place not in output.pooled or epoch != sequence.epoch:
                return None  # what was computed before a preemption is computed again, so that its blocks are there
            return self._residents.finish(sequence, FinishReason.STOP, pooled=output.pooled[place])
        return self._report(sequence, token_ids, output.logprobs[place] if output.logprobs is not None else None)

    def _advance_beams(
        self, rows: list[ScheduledSequence], candidates: Mapping[int, Candidates]
    ) -> list[SequenceUpdate]:
        """Let the groups whose candidates have come choose among them."""
        groups: dict[BeamGroup, dict[Sequence, Candidates]] = {}
        for place, found in candidates.items():
            sequence, epoch, _, _ = rows[place]
            if sequence.status is SequenceStatus.RUNNING and epoch == sequence.epoch:
                assert sequence.beams is not None
                groups.setdefault(sequence.beams, {})[sequence] = found
                if sequence.request.tenant is not None:
                    self._waiting.charge(sequence.request.tenant, 1)
        return [update for group, found_by in groups.items() for update in group.advance(found_by)]

    def _end_all(
        self, sequences: Iterable[Sequence], reason: FinishReason, error: str | None = None
    ) -> list[SequenceUpdate]:
        """End sequences without an answer, those that have not ended; a beam takes its whole group with it."""
        updates = []
        for sequence in sequences:
            if sequence.status is SequenceStatus.FINISHED:
                continue
            if sequence.beams is None:
                updates.append(self._residents.finish(sequence, reason, error=error))
            else:
                updates.append(sequence.beams.end(reason, error))
        return updates

    def _report(
        self, sequence: Sequence, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...] | None
    ) -> SequenceUpdate:
        """Report the last tokens of a sequence, cut where it ends."""
        if sequence.first_token_time is None:
            sequence.first_token_time = self._clock()
        num_tokens = len(sequence.token_ids)
        if num_tokens >= sequence.max_num_tokens or not sequence.stop_token_ids.isdisjoint(token_ids):
            for position in range(num_tokens - len(token_ids), num_tokens):
                reason = _stop_reason(sequence, position)
                if reason is not None:
                    return self._end(sequence, reason, token_ids, position + 1, logprobs)
        self._count_generated(sequence, len(token_ids))
        return SequenceUpdate(
            sequence.request.request_id,
            sequence.index,
            token_ids,
            logprobs,
            cached=sequence.cached,
        )

    def _count_generated(self, sequence: Sequence, num_tokens: int) -> None:
        self.counters.num_generation_tokens += num_tokens
        if sequence.request.tenant is not None:
            self._waiting.charge(sequence.request.tenant, num_tokens)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token_ids: tuple[int, ...],
        num_tokens: int,
        logprobs: tuple[TokenLogprobs, ...] | None,
    ) -> SequenceUpdate:
        """Finish a sequence after `num_tokens` of its tokens, some of which are the new `token_ids`."""
        num_dropped = len(sequence.token_ids) - num_tokens
        del sequence.token_ids[num_tokens:]
        token_ids = token_ids[: len(token_ids) - num_dropped]
        self._count_generated(sequence, len(token_ids))
        return self._residents.finish(
            sequence,
            reason,
            token_ids=token_ids,
            logprobs=logprobs[: len(token_ids)] if logprobs is not None else None,
            stop_token_id=token_ids[-1] if reason is FinishReason.STOP else None,
        )


def _stop_reason(sequence: Sequence, position: int) -> FinishReason | None:
    """Return why the sequence ends with the token at `position`; None if it goes on."""
    if position >= sequence.first_stop_position and sequence.token_ids[position] in sequence.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if position + 1 >= sequence.max_num_tokens else None
