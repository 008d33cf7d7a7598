"""SchedulerBench: an engine on a fake executor, and everything it has said, for tests of what the scheduler does."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from octavo_engine.batch import ScheduledBatch
from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.engine import Engine
from octavo_engine.executor.fake import Candidates, FakeExecutor, NextToken, hashed_candidates
from octavo_engine.preemption import PreemptionPolicy
from octavo_engine.scheduler import Scheduler
from octavo_engine.types import FinishReason, Request, SamplingParams, SequenceUpdate, TokenSpan
from octavo_engine.waiting import QueuePolicy
from octavo_kvcache import CacheManager

_MAX_NUM_STEPS = 5000
_OF_REQUEST = {own.name for own in fields(Request)}


@dataclass
class SchedulerBench:
    """An engine without a model, driven step by step; requests arrive in the order in which they are added."""

    engine: Engine
    executor: FakeExecutor
    cache: CacheManager
    updates: list[SequenceUpdate] = field(default_factory=list)
    num_arrivals: int = 0

    @classmethod
    def make(
        cls,
        next_token: NextToken,
        num_late: int,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 64,
        max_model_len: int = 200,
        eos: Iterable[int] = (),
        fail: Iterable[int] = (),
        max_num_kept: int = 64,
        candidates: Candidates | None = None,
        preemption: PreemptionPolicy | None = None,
        max_num_timelines: int = 0,
        clock: Callable[[], float] = time.monotonic,
        queue: QueuePolicy | None = None,
        num_shares: int = 1,
        **cache: Any,
    ) -> Self:
        """Make one whose executor answers `num_late` steps late and fails in the steps `fail`."""
        manager = CacheManager(num_blocks, block_size, **cache)
        scheduler = Scheduler(
            manager,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            eos_token_ids=eos,
            max_num_kept=max_num_kept,
            preemption=preemption,
            max_num_timelines=max_num_timelines,
            clock=clock,
            queue=queue,
            num_shares=num_shares,
        )
        executor = FakeExecutor(
            block_size,
            next_token,
            num_late=num_late,
            fail_steps=frozenset(fail),
            candidates=candidates or hashed_candidates(64),
        )
        return cls(Engine(scheduler, executor), executor, manager)

    @property
    def batches(self) -> list[ScheduledBatch]:
        """Every step that was run."""
        return self.executor.batches

    def add(
        self, request_id: str, tokens: Sequence[int], beams: BeamSearchParams | None = None, **options: Any
    ) -> Request:
        """Queue a request, for four tokens unless it says otherwise; options are a Request's or its sampling's."""
        self.num_arrivals += 1
        own = {name: options.pop(name) for name in _OF_REQUEST.intersection(options)}
        request = Request(
            request_id=request_id,
            inputs=(TokenSpan(tuple(tokens)),),
            sampling=SamplingParams(**{"seed": 0, "max_tokens": 4, **options}) if beams is None else beams.sampling(),
            beams=beams,
            arrival_time=float(self.num_arrivals),
            **own,
        )
        if request.pin:
            self.engine.pins.prepare(request)
        self.engine.add(request)
        return request

    def step(self, times: int = 1) -> None:
        """Advance."""
        for _ in range(times):
            self.updates += self.engine.step()

    def run(self) -> dict[tuple[str, int], list[int]]:
        """Run everything to its end; return all tokens."""
        for _ in range(_MAX_NUM_STEPS):
            if not self.engine.has_work:
                return self.tokens()
            self.step()
        raise AssertionError("the engine does not come to an end")

    def tokens(self) -> dict[tuple[str, int], list[int]]:
        """Return what has come so far, by request id and index."""
        tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        for update in self.updates:
            tokens[update.request_id, update.index] += update.token_ids
        return dict(tokens)

    def reasons(self) -> dict[tuple[str, int], FinishReason]:
        """Return why sequences ended, by request id and index."""
        return {(u.request_id, u.index): u.finish_reason for u in self.updates if u.finish_reason}

    def assert_empty(self) -> None:
        """Check that nothing is held any more but what is pinned."""
        stats = self.cache.stats()
        assert (stats.num_used, stats.num_sequences, stats.num_parked) == (stats.num_pinned, 0, 0)
        assert (stats.host.num_used, stats.host.num_sequences) == (0, 0)
        scheduler = self.engine.scheduler
        assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
        assert scheduler._rows.num_available == len(scheduler._rows._free)
