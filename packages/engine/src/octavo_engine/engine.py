"""The engine loop: schedule a step, submit it, take in the oldest one."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from octavo_engine.adapters.info import AdapterStats
from octavo_engine.adapters.store import Adapters
from octavo_engine.batch import ScheduledBatch
from octavo_engine.branch import Branch, Parent, unknown_parent
from octavo_engine.errors import RankUnreachable, UnknownAdapter, WorkerLost
from octavo_engine.executor.base import Executor, Pending
from octavo_engine.executor.inline import Done
from octavo_engine.executor.workers import Team
from octavo_engine.expert_stats import ExpertStats
from octavo_engine.overlap import OverlapStats
from octavo_engine.scheduler import Scheduler
from octavo_engine.standby import ModelHost, Standby
from octavo_engine.types import Request, SequenceUpdate

_log = logging.getLogger(__name__)


class Engine:
    """Runs requests to their ends, step by step, in token ids; not thread-safe.

    With an executor that takes several steps at once, the next step is scheduled and submitted before the oldest
    one's result is read.

    Args:
        scheduler: chooses the steps.
        executor: computes them.
        host: holds the model; None for one that cannot be put aside.
        adapters: that requests may name; None if they may name none.
        experts: tells which experts of a mixture the tokens went to.
        ranks: other processes that have parts of the model; None if there are none.

    Attributes:
        scheduler: chooses the steps.
        pins: prefixes that stay in the cache.
        standby: puts the model aside, brings it back, or replaces its weights.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        host: ModelHost[Any] | None = None,
        adapters: Adapters | None = None,
        experts: Callable[[], ExpertStats] = ExpertStats,
        ranks: Team | None = None,
    ) -> None:
        self.scheduler = scheduler
        self._adapters = adapters
        self._experts = experts
        self.pins = scheduler.pins
        self.standby = Standby(scheduler, host)
        self._executor = executor
        self._ranks = ranks
        self._has_started_over = False
        self._in_flight: deque[tuple[ScheduledBatch, Pending]] = deque()

    @property
    def has_work(self) -> bool:
        """True until every request has ended and every step was read."""
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request that was validated against the model's limits.

        Raises:
            EngineAsleep: if no requests are taken now.
            UnknownAdapter, InvalidAdapter: if the adapter is not served, or had to be read again and could not be.
        """
        self.standby.check()
        self.scheduler.add(request, b"" if request.adapter is None else self.adapters.bind(request.adapter))

    @property
    def serves_adapters(self) -> bool:
        """Whether there are `adapters`."""
        return self._adapters is not None

    @property
    def adapter_stats(self) -> AdapterStats:
        """What adapters have taken so far."""
        if self._adapters is None:
            return AdapterStats()
        return self.scheduler.adapters.stats(self._adapters.num_loaded, self._adapters.num_reads)

    @property
    def expert_stats(self) -> ExpertStats:
        """Which experts of a mixture the tokens went to."""
        return self._experts()

    @property
    def overlap_stats(self) -> OverlapStats:
        """Which steps did not wait for earlier ones."""
        return self._executor.overlap

    @property
    def adapters(self) -> Adapters:
        """The adapters that are served.

        Raises:
            UnknownAdapter: if the engine serves none.
        """
        if self._adapters is None:
            raise UnknownAdapter("adapters are not served; start the engine with enable_lora")
        return self._adapters

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceUpdate]:
        """End a request, or one of its sequences, at once; its blocks are free after the steps in flight."""
        return self.scheduler.abort(request_id, index)

    def release(self, request_id: str) -> bool:
        """Drop what is kept of an ended request and free its blocks at once; False if nothing is."""
        return self.scheduler.release(request_id)

    def branch_tokens(self, branch: Branch, salt: bytes = b"") -> list[int]:
        """Return the tokens of a running or kept request that a branch takes over.

        Raises:
            InvalidRequest: if there is no such parent, or it has fewer tokens.
        """
        known = self.scheduler.known_tokens(Parent(branch.request_id, branch.index))
        if known is None:
            raise unknown_parent(branch.request_id, branch.index)
        return known.upto(branch, salt)

    def step(self) -> list[SequenceUpdate]:
        """Advance by one step and return what finished steps brought; may be empty while steps are in flight."""
        if self._ranks is not None and self._ranks.is_lost:
            if self._in_flight:
                return self._take_oldest()
            if (updates := self._replace(self._ranks)) is not None:
                return updates
        batch = self.scheduler.schedule()
        if batch is not None:
            self._submit(batch)
        if batch is None or len(self._in_flight) >= self._executor.max_in_flight:
            return self._take_oldest()
        return []

    def check_ranks(self) -> None:
        """Return if all processes that have a part of the model work, or will be replaced.

        Raises:
            WorkerLost: one was lost, and this engine cannot replace it.
        """
        if self._ranks is not None:
            self._ranks.check()

    def _replace(self, ranks: Team) -> list[SequenceUpdate] | None:
        """Let lost ranks be replaced; None once that is done, and the next step can be chosen.

        The keys and values of all tokens are lost with a rank, whether a step was in flight or not.
        """
        updates = []
        if not self._has_started_over:
            updates = self._start_over((), ranks.trouble or WorkerLost("a rank was lost"))
        if not ranks.are_ready():
            return updates
        self._has_started_over = False
        return updates or None

    def _start_over(self, lost: Collection[ScheduledBatch], error: WorkerLost) -> list[SequenceUpdate]:
        self._has_started_over = True
        reason = f"{type(error).__name__}: {error}"
        return self.scheduler.start_over(lost, reason, ends_all=isinstance(error, RankUnreachable))

    def drain(self) -> None:
        """Read the steps in flight, of whose sequences nobody wants to hear any more: all were aborted."""
        while self._in_flight:
            self._take_oldest()

    def close(self) -> None:
        """Release the executor."""
        self._executor.close()
        self._experts = ExpertStats  # what counted them holds the model

    def _submit(self, batch: ScheduledBatch) -> None:
        """Submit a step. One that could not even be submitted has failed, so that its sequences come to their ends."""
        try:
            pending = self._executor.submit(batch)
        except BaseException as error:  # an interrupt too: the scheduler waits for the step's answer
            reason = error if isinstance(error, Exception) else RuntimeError("the step was interrupted")
            self._in_flight.append((batch, Done(reason)))
            del reason  # it holds this frame
            raise
        self._in_flight.append((batch, pending))

    def _take_oldest(self) -> list[SequenceUpdate]:
        if not self._in_flight:
            return []
        batch, pending = self._in_flight.popleft()
        try:
            output = pending.result()
        except WorkerLost as error:
            _log.error("step %d was lost, and the keys and values of all tokens with it: %s", batch.step_id, error)
            lost = [batch, *(later for later, _ in self._in_flight)]
            self._in_flight.clear()
            return self._start_over(lost, error)
        except Exception as error:  # whatever the step raised, it ends the requests of this step and no others
            _log.exception("step %d failed; its %d sequences end with an error", batch.step_id, batch.num_rows)
            return self.scheduler.fail(batch, f"{type(error).__name__}: {error}")
        except BaseException:  # interrupted while it waited: it is read again
            self._in_flight.appendleft((batch, pending))
            raise
        return self.scheduler.update(batch, output)
