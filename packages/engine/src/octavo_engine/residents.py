"""Residents: the sequences that run or wait, and how one goes from state to state with its row and its blocks."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable

from octavo_engine.adapters.slots import AdapterSlots
from octavo_engine.branch import KnownTokens, Parent
from octavo_engine.counters import SchedulerCounters
from octavo_engine.kept import KeptSequences
from octavo_engine.pins import Pins
from octavo_engine.preemption import PreemptionPolicy
from octavo_engine.row_pool import RowPool
from octavo_engine.sequence import Sequence, SequenceStatus, num_common
from octavo_engine.step import ScheduledSequence
from octavo_engine.swapper import Swapper
from octavo_engine.timeline import PreemptionKind, Timelines
from octavo_engine.types import CachedTokens, FinishReason, RequestTimes, SequenceUpdate, TokenLogprobs
from octavo_engine.waiting import QueuePolicy, WaitingQueue
from octavo_kvcache import CacheManager


class Residents:
    """What the parts of the scheduler share; only they write it.

    Args:
        cache: the block manager.
        max_num_seqs: rows in the runner.
        max_num_kept: the most ended sequences that are kept for forks.
        clock: seconds, monotonic.
        policy: chooses what becomes of the blocks of preempted sequences.
        max_num_timelines: ended requests whose timelines are remembered.
        queue: the order of those that wait; None goes by priority and arrival.
        adapters: which versions of adapters sequences use; None where there are none.

    Attributes:
        timelines: what happens to requests.
        running: sequences that hold a row, in order.
        waiting: sequences that wait for a row or for blocks.
        by_request: the live sequences of each request, in index order.
        in_flight: the steps whose answers have not been read, oldest first.
        rows: the runner's rows.
        kept: sequences that have ended and can still be forked.
        pins: prefixes that stay in the cache.
        swapper: moves blocks of waiting sequences to the host and back.
    """

    def __init__(
        self,
        cache: CacheManager,
        *,
        max_num_seqs: int,
        max_num_kept: int,
        clock: Callable[[], float],
        policy: PreemptionPolicy | None = None,
        max_num_timelines: int = 0,
        queue: QueuePolicy | None = None,
        adapters: AdapterSlots | None = None,
    ) -> None:
        self.cache = cache
        self.clock = clock
        self.timelines = Timelines(max_num_timelines, clock)
        self.counters = SchedulerCounters()
        self.kept = KeptSequences(cache, max_num_kept)
        self.pins = Pins(cache)
        self.adapters = AdapterSlots() if adapters is None else adapters
        self.swapper = Swapper(cache, policy)
        self.rows = RowPool(max_num_seqs)
        self.running: list[Sequence] = []
        self.waiting: QueuePolicy = WaitingQueue() if queue is None else queue
        self.by_request: dict[str, list[Sequence]] = {}
        self.in_flight: deque[tuple[int, list[ScheduledSequence]]] = deque()
        self._next_seq_id = 0

    @property
    def last_step(self) -> int | None:
        """The last step in flight."""
        return self.in_flight[-1][0] if self.in_flight else None

    def take_seq_id(self) -> int:
        """Return an id that no sequence has had."""
        self._next_seq_id += 1
        return self._next_seq_id

    def enter(self, sequence: Sequence, cached: CachedTokens) -> None:
        """Give a sequence that waited, and has blocks now, a row; rows for its forks are set aside."""
        sequence.num_computed_tokens = cached.total
        if sequence.scheduled_time is None:
            sequence.scheduled_time = self.clock()
            sequence.cached = cached
            self.counters.count_cached(cached)
        self.resume(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Give a sequence that waited a row, where it goes on as far as it was computed."""
        sequence.status = SequenceStatus.RUNNING
        self.timelines.entered(sequence)
        sequence.row = self.rows.take()
        sequence.adapter_slot = self.adapters.take(sequence.adapter)
        self.rows.reserve(sequence.num_forks_wanted)
        insort(self.running, sequence)

    def add_fork(self, parent: Sequence, index: int) -> Sequence:
        """Make a sequence that shares all tokens and blocks of a running one, in a row of its own."""
        child = Sequence(
            seq_id=self.take_seq_id(),
            request=parent.request,
            index=index,
            token_ids=list(parent.token_ids),
            num_prompt_tokens=parent.num_prompt_tokens,
            max_num_output_tokens=parent.max_num_output_tokens,
            stop_token_ids=parent.stop_token_ids,
            status=SequenceStatus.RUNNING,
            row=self.rows.take(),
            num_computed_tokens=parent.num_computed_tokens,
            cached=parent.cached,
            scheduled_time=parent.scheduled_time,
            adapter=parent.adapter,
            adapter_slot=self.adapters.take(parent.adapter),
        )
        self.cache.fork(parent.seq_id, child.seq_id)
        self.by_request[parent.request.request_id].append(child)
        insort(self.running, child)
        return child

    def known_tokens(self, parent: Parent) -> KnownTokens | None:
        """Return the tokens of a sequence that runs, waits or is kept; None if it does none of these."""
        sequence = self._find(parent)
        if sequence is None:
            return self.kept.known_tokens(parent)
        return KnownTokens(
            tuple(sequence.token_ids), sequence.num_prompt_tokens, sequence.request.salt, sequence.adapter
        )

    def share(self, sequence: Sequence, token_ids: list[int]) -> int:
        """Start a sequence with its parent's blocks, as far as tokens are the same; 0 if the parent has none to give.

        Only tokens of steps that were answered are shared: what is copied of a block is copied before the next step.
        At least the last of `token_ids` is left to compute.
        """
        parent = sequence.request.parent
        known = None if parent is None else self.known_tokens(parent)
        if parent is None or known is None:
            return 0
        if (known.salt, known.adapter) != (sequence.request.salt, sequence.adapter):
            return 0
        source = self._find(parent)
        blocks: tuple[int | str, int] | None
        if source is None:
            blocks = self.kept.blocks(parent)
        else:
            blocks = None if source.row is None else (source.seq_id, self.cache.num_committed(source.seq_id))
        if blocks is None:
            return 0
        source_id, num_computed = blocks
        num_shared = min(num_common(known.token_ids, token_ids), num_computed, len(token_ids) - 1)
        if num_shared:
            self.cache.fork(source_id, sequence.seq_id, num_tokens=num_shared)
        return num_shared

    def _find(self, parent: Parent) -> Sequence | None:
        """Return the live sequence that a parent names; a beam is none, for it may be another one tomorrow."""
        found = (s for s in self.by_request.get(parent.request_id, ()) if s.index == parent.index and s.beams is None)
        return next(found, None)

    def become(self, sequence: Sequence, source: Sequence) -> None:
        """Give a running sequence the tokens and blocks of another in place of its own; no step in flight has it."""
        self.cache.free(sequence.seq_id)
        self.cache.fork(source.seq_id, sequence.seq_id)
        sequence.token_ids = list(source.token_ids)
        sequence.num_computed_tokens = source.num_computed_tokens

    def join(self, sequence: Sequence, source: Sequence, num_tokens: int) -> None:
        """Let a sequence run that shares its first tokens, and their blocks, with a running one."""
        self.cache.fork(source.seq_id, sequence.seq_id, num_tokens=num_tokens)
        sequence.num_computed_tokens = num_tokens
        self.resume(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's row and blocks and let it wait: with its blocks on the host, or without any."""
        if self.swapper.try_out([sequence]):
            self.counters.num_swaps += 1
            self.move_out(sequence)
        else:
            self.withdraw(sequence)
        self.wait(sequence)

    def recompute(self, sequence: Sequence) -> None:
        """Take a running sequence's row and blocks and let it wait; it will be computed again from its tokens."""
        self.withdraw(sequence)
        self.wait(sequence)

    def wait(self, sequence: Sequence) -> None:
        """Put a sequence that was preempted, or the leader of beams that were, in the queue."""
        self.counters.num_preemptions += 1
        kind: PreemptionKind = "swap" if self.swapper.has(sequence) else "recompute"
        self.timelines.preempted(sequence, kind, len(self.waiting))
        self.waiting.push(sequence)

    def withdraw(self, sequence: Sequence) -> None:
        """Take a running sequence's row and blocks; answers in flight to what it computed are void."""
        self.leave(sequence)
        self._stop(sequence)
        sequence.num_computed_tokens = 0
        sequence.moved_by = None

    def move_out(self, sequence: Sequence) -> None:
        """Take the row of a running sequence whose blocks are on the host; drawn tokens in flight still count.

        Candidates and embeddings in flight are void, so that what they come from is computed again.
        """
        self._leave_row(sequence)
        self._stop(sequence)
        if sequence.beams is not None or sequence.request.task == "embed":
            sequence.num_computed_tokens = min(sequence.num_computed_tokens, len(sequence.token_ids) - 1)

    def leave(self, sequence: Sequence) -> None:
        """Take a running sequence's row and blocks; the blocks are free after the steps in flight."""
        self._leave_row(sequence)
        # A step that failed may not have copied what the last block held before, so that it must not be hit.
        token_ids = () if sequence.finish_reason is FinishReason.ERROR else sequence.token_ids
        self.cache.free(sequence.seq_id, after=self.last_step, token_ids=token_ids)

    def _leave_row(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.running.remove(sequence)
        self.rows.unreserve(sequence.num_forks_wanted)
        self.rows.release(sequence.row)
        self.adapters.give_back(sequence.adapter)
        sequence.row = sequence.adapter_slot = None

    def _stop(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        sequence.epoch += 1

    def distrust_copies(self, step_id: int) -> None:
        """Compute again what depends on copies between tiers that a step which failed, or a later one, was to make."""
        self.swapper.distrust_copies()
        for sequence in [s for sequences in self.by_request.values() for s in sequences]:
            if sequence.moved_by is not None and sequence.moved_by >= step_id:
                self._begin_again(sequence)

    def start_over(self) -> None:
        """Compute everything again: the keys and values of all tokens are lost, on every tier; kept tokens stay."""
        self.swapper.copies.clear()
        self.swapper.distrust_copies()
        for sequence in [s for sequences in self.by_request.values() for s in sequences]:
            self._begin_again(sequence)
        while self.kept.give_up_blocks():
            pass
        self.pins.reset()

    def _begin_again(self, sequence: Sequence) -> None:
        """Compute a sequence again, and the beams of its group with it."""
        if sequence.row is None:
            self.swapper.drop(sequence)
            sequence.num_computed_tokens = 0
            sequence.moved_by = None
        elif sequence.beams is None:
            self.recompute(sequence)
        else:
            sequence.beams.recompute()

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        pooled: tuple[float, ...] | None = None,
        stop_token_id: int | None = None,
        error: str | None = None,
    ) -> SequenceUpdate:
        """End a sequence wherever it stands, and report its last tokens."""
        sequence.finish_reason = reason
        if sequence.request.pin:
            self.pins.end(sequence, reason)
        if sequence.request.keep and reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.kept.add(sequence)
        if sequence.status is SequenceStatus.RUNNING:
            self.leave(sequence)
        else:
            self.waiting.discard()
            self.swapper.drop(sequence)
        sequence.status = SequenceStatus.FINISHED
        self.counters.finished[reason.value] += 1
        self.timelines.ended(sequence, sequence.index, reason, len(sequence.token_ids) - sequence.num_prompt_tokens)
        self.forget(sequence)
        return SequenceUpdate(
            request_id=sequence.request.request_id,
            index=sequence.index,
            token_ids=token_ids,
            logprobs=logprobs,
            pooled=pooled,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            error=error,
            cached=sequence.cached,
            times=self.times(sequence),
        )

    def forget(self, sequence: Sequence) -> None:
        """Take a sequence that has ended off its request's list."""
        siblings = self.by_request[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self.by_request[sequence.request.request_id]
            self.adapters.let_go(sequence.adapter)
            self.timelines.left(sequence.request.request_id)

    def times(self, sequence: Sequence) -> RequestTimes:
        """Return when things happened to a sequence that ends now."""
        return RequestTimes(
            arrival=sequence.request.arrival_time,
            scheduled=sequence.scheduled_time,
            first_token=sequence.first_token_time,
            finished=self.clock(),
            num_preemptions=sequence.num_preemptions,
        )
