"""StepTaker: what the answer to a step means for each sequence that took part in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from octavo_engine.batch import ModelOutput, ScheduledBatch
from octavo_engine.beam_group import BeamGroup
from octavo_engine.beam_search import Candidates
from octavo_engine.preemption import PreemptionPolicy
from octavo_engine.residents import Residents
from octavo_engine.sequence import Sequence, SequenceStatus
from octavo_engine.step import ScheduledSequence
from octavo_engine.types import FinishReason, SequenceUpdate, TokenLogprobs


class StepTaker:
    """Takes in steps in the order in which they were chosen: appends tokens, ends sequences, reports.

    Args:
        residents: the sequences, and the steps in flight.
        clock: seconds, monotonic.
        preemption: is told how long steps take; None is not.
    """

    def __init__(self, residents: Residents, clock: Callable[[], float], preemption: PreemptionPolicy | None) -> None:
        self._residents = residents
        self._cache = residents.cache
        self._counters = residents.counters
        self._timelines = residents.timelines
        self._in_flight = residents.in_flight
        self._waiting = residents.waiting
        self._clock = clock
        self._preemption = preemption
        self._last_step: int | None = None  # in flight when an answer is taken in

    def take(self, batch: ScheduledBatch, output: ModelOutput) -> list[SequenceUpdate]:
        """Take in the answer to the oldest step in flight."""
        rows = self.end_step(batch)
        updates = []
        for place, (scheduled, token_ids) in enumerate(zip(rows, output.token_ids, strict=True)):
            update = self._take_row(scheduled, token_ids, place, output)
            if update is not None:
                if output.prompt_logprobs and place in output.prompt_logprobs:
                    update = update._replace(prompt_logprobs=output.prompt_logprobs[place])
                updates.append(update)
        if output.candidates:
            updates += self._advance_beams(rows, output.candidates)
        return updates

    def end_step(self, batch: ScheduledBatch) -> list[ScheduledSequence]:
        """Take the oldest step, which is `batch`, off those in flight; return its rows."""
        step_id, rows = self._in_flight.popleft()
        assert step_id == batch.step_id, "steps are read in the order of submission"
        if self._preemption is not None:
            self._preemption.end_step(self._clock())
        self._cache.step_done(step_id)
        if self._timelines.steps:
            self._timelines.end_step(step_id)
        self._last_step = self._residents.last_step
        return rows

    def take_back(self, batches: Collection[ScheduledBatch]) -> list[Sequence]:
        """End steps that have no answers, whose sequences go on; return these."""
        sequences: dict[Sequence, None] = dict.fromkeys(() if batches else self._residents.running)
        for batch in batches:
            self._counters.num_lost_steps += 1
            for sequence, _, _, samples in self.end_step(batch):
                sequence.num_placeholders -= samples
                sequences[sequence] = None
        for sequence in sequences:
            sequence.num_losses += 1
        return list(sequences)

    def end_all(
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

    def _take_row(
        self, scheduled: ScheduledSequence, token_ids: tuple[int, ...], place: int, output: ModelOutput
    ) -> SequenceUpdate | None:
        sequence, epoch, num_computed_tokens, samples = scheduled
        if sequence.status is SequenceStatus.FINISHED:  # it ended while this step was in flight
            return None
        if output.errors and place in output.errors:
            return self.end_all([sequence], FinishReason.ERROR, output.errors[place])[0]
        sequence.num_placeholders -= samples
        sequence.token_ids += token_ids
        if output.sampler_states and place in output.sampler_states:
            sequence.sampler_state = output.sampler_states[place]
        if epoch == sequence.epoch:
            self._cache.commit(sequence.seq_id, sequence.token_ids, num_computed_tokens, in_flight=self._last_step)
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
        self._counters.num_generation_tokens += num_tokens
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
