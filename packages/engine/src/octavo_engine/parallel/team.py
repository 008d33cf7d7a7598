"""Team: the other ranks of a model as rank 0 has them: started, joined, loaded, told what to do, watched, ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

from octavo_engine.errors import EngineError, RankUnreachable, WorkerLost
from octavo_engine.parallel.channel import Command, Message
from octavo_engine.parallel.guard import RANK_TIMEOUT, Guard
from octavo_engine.parallel.job import Job
from octavo_engine.parallel.launch import Launch, StartedRank, Worker
from octavo_engine.parallel.lobby import Lobby
from octavo_engine.parallel.rendezvous import Rendezvous

JOIN_SECONDS = 60.0
"""Within which a worker must have started, found rank 0 and looked at the files."""

LOAD_SECONDS = 1800.0
"""Within which it must have loaded its part."""

STEP_SECONDS = 30.0
"""That ranks wait for each other within a layer."""

STAGE_SECONDS = 86400.0
"""That a stage waits for the one before it where nothing else is asked for."""

_LOOK_SECONDS = 0.02
_STOP_SECONDS = 5.0
_LAST_WORDS_SECONDS = 1.0  # for a process that has broken off to be seen ending

_log = logging.getLogger(__name__)


class Team:
    """The ranks from 1 on. One thread at a time uses it.

    Args:
        job: what they run.
        launch: starts one; None if torchrun starts them all, rank 0 too.
        host: of the store where they meet, which rank 0 serves if it starts them.
        port: of it; 0 takes a free one.
        join_seconds: within which a rank must have joined.
        rank_timeout: seconds that a rank's machine may be out of reach.

    Attributes:
        links: connects rank 0 with the others.
        num_restarts: how often lost ranks were replaced.
    """

    def __init__(
        self,
        job: Job,
        launch: Launch | None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        join_seconds: float = JOIN_SECONDS,
        rank_timeout: float = RANK_TIMEOUT,
    ) -> None:
        self._job = job
        self._launch = launch
        self._address = host, port
        self._lobby: Lobby | None = None
        self._join_seconds = join_seconds
        self.links = job.links(0)
        self._channel = self.links.channel()
        self._rendezvous: Rendezvous | None = None
        self._workers: dict[int, Worker] = {}
        self._memory: Message | None = None
        self._lost: WorkerLost | None = None
        self._guard = Guard(0, self.links.cut)
        self._rank_timeout = rank_timeout
        self.num_restarts = 0

    def start(self) -> None:
        """Start all ranks and connect with them; they begin to load their parts.

        Raises:
            WorkerLost: a rank did not join in time, or has ended.
            RankMismatch: it has other files or versions.
            InvalidConfig: the port is in use.
        """
        job = self._job
        host, port = self._address
        prefix = ""
        if self._launch is None:
            self._lobby = Lobby(host, port, job.size, seconds=self._join_seconds)
            prefix = self._lobby.prefix
        serves = self._launch is not None
        self._rendezvous = Rendezvous(host, port, serves=serves, seconds=self._join_seconds, prefix=prefix)
        self._rendezvous.leave("job", job.encode())
        launch = self._launch or StartedRank
        for rank in range(1, job.size):
            self._workers[rank] = launch(*self._rendezvous.address, rank)
        self._await("joined", self._join_seconds)
        self._guard.watch(self._rendezvous, job.size, wait=self._join_seconds, seconds=self._rank_timeout)
        self._rendezvous.connect(self.links, job.device_of(0), job.step_seconds, job.stage_seconds)
        self._lost = None

    def await_loaded(self) -> None:
        """Wait until all ranks have loaded their parts.

        Raises:
            WorkerLost: one has ended, or takes too long.
            EngineError: what kept it from loading.
        """
        self._await("loaded", LOAD_SECONDS)
        assert self._rendezvous is not None
        for rank in self._workers:
            _log.info("rank %d has read %s bytes of weights", rank, self._rendezvous.take(f"loaded/{rank}"))
        self._guard.expect_beats(self._job.step_seconds)

    def allocate(self, num_blocks: int, num_host_blocks: int) -> None:
        """Let all ranks take memory for their part of the KV cache, and again whenever they are replaced."""
        self._memory = Message(Command.ALLOCATE, (num_blocks, num_host_blocks))
        with self.together(self._memory):
            pass

    @contextmanager
    def together(self, message: Message, ranks: range | None = None) -> Generator[None]:
        """Tell other ranks, or all of them, to do something, and do rank 0's part of it inside.

        An error inside leaves the ranks at different places, so that all are replaced before they work again.

        Raises:
            WorkerLost: a rank has ended, or does not answer; says which and why, as far as is known.
        """
        if (trouble := self.trouble) is not None:
            raise type(trouble)(str(trouble))
        try:
            self._channel.send(message, ranks)
            yield
        except Exception as error:
            self._lost = self._reason(error)
            raise self._lost from error
        except BaseException:
            self._lost = WorkerLost("rank 0 was interrupted in the middle of a step")
            raise

    def deal(self, parts: Sequence[bytes]) -> None:
        """Give each other rank its own bytes, in the order of ranks, all of one length; part of a command."""
        self._channel.deal(parts)

    @property
    def is_lost(self) -> bool:
        """Whether the ranks must be replaced before the next step."""
        return self._lost is not None or self._guard.loss is not None

    @property
    def trouble(self) -> WorkerLost | None:
        """Why the ranks do not work together any more, as far as is known; None if they do. Any thread may ask."""
        loss = self._guard.loss
        return self._lost or (None if loss is None else loss.error())

    def are_ready(self) -> bool:
        """Replace lost ranks, after which a step may run.

        Raises:
            WorkerLost: see `restart`.
        """
        if self.is_lost:
            self.restart()
        return True

    def check(self) -> None:
        """Return if the ranks work, or can be replaced from here.

        Raises:
            WorkerLost: why they do not; torchrun has to start them again.
        """
        if self._launch is None and (trouble := self.trouble) is not None:
            raise type(trouble)(f"{trouble}; torchrun starts all ranks again, as often as its --max-restarts says")

    def restart(self) -> None:
        """Replace all ranks; what they had of the KV cache is gone.

        Raises:
            WorkerLost: they cannot be replaced, or it is for torchrun to do that.
        """
        self.check()
        started = time.monotonic()
        self._lost = self.trouble
        self._end(0)
        self.start()
        self.await_loaded()
        if self._memory is not None:
            with self.together(self._memory):
                pass
        self.num_restarts += 1
        _log.warning("the ranks were replaced in %.1f s", time.monotonic() - started)

    def close(self) -> None:
        """End all ranks, and wait for it."""
        seconds = 0.0
        if not self.is_lost and self.links.are_connected:
            try:
                self._channel.send(Message(Command.STOP))
                self._guard.close(says_farewell=True)
                seconds = _STOP_SECONDS
            except WorkerLost as error:
                _log.warning("while the ranks were ended: %s", error)
        self._end(seconds)

    def _end(self, seconds: float) -> None:
        """End all ranks after some seconds in which they may do so by themselves."""
        self._guard.close(says_farewell=False)
        until = time.monotonic() + seconds
        if not seconds:
            self.links.disconnect()  # those that wait for rank 0 end by it
        for worker in self._workers.values():
            worker.stop(max(0.0, until - time.monotonic()))
        self._workers.clear()
        self.links.disconnect()
        self._rendezvous = None

    def _await(self, what: str, seconds: float) -> None:
        """Wait until every rank has left a word.

        Raises:
            WorkerLost: one has ended, or takes longer.
            EngineError: why it has ended.
        """
        assert self._rendezvous is not None
        until = time.monotonic() + seconds
        missing = list(self._workers)
        while missing:
            if self._lobby is not None:
                self._lobby.admit()
            missing = [rank for rank in missing if not self._rendezvous.has(f"{what}/{rank}")]
            self._look(missing)
            if missing and time.monotonic() > until:
                raise WorkerLost(f"rank {missing[0]} has not {what} within {seconds:g} s; its log says more")
            time.sleep(_LOOK_SECONDS if missing else 0)

    def _look(self, ranks: Iterable[int]) -> None:
        """Raise why one of some ranks has ended, if one has."""
        error = self._culprit(ranks)
        if error is not None:
            raise error

    def _culprit(self, ranks: Iterable[int]) -> EngineError | None:
        """Return why one of some ranks has ended by itself; None if none has."""
        assert self._rendezvous is not None
        if (loss := self._guard.loss) is not None and loss.is_unreachable:  # nor, perhaps, can the store be
            return loss.error()
        for rank in ranks:
            ended = self._workers[rank].ended()  # first: what a rank says of its end comes before the end
            failure = self._rendezvous.failure(rank)
            if failure is not None and not failure.is_consequence:
                return failure.error
            if failure is None and ended is not None:
                return WorkerLost(f"rank {rank} {ended}")
        return None

    def _reason(self, error: Exception) -> WorkerLost:
        """Return what is known of why the ranks do not work together any more."""
        if not isinstance(error, WorkerLost):
            return WorkerLost(f"rank 0 failed in the middle of a step: {type(error).__name__}: {error}")
        if self._rendezvous is None:
            return error
        began = time.monotonic()
        while (culprit := self._culprit(self._workers)) is None:
            silent = [rank for rank in self._workers.keys() - self._guard.losses if not self._rendezvous.failure(rank)]
            patience = self._rank_timeout + _LAST_WORDS_SECONDS if silent else _LAST_WORDS_SECONDS
            if time.monotonic() - began > patience:
                break
            time.sleep(_LOOK_SECONDS)
        if culprit is not None:
            return culprit if isinstance(culprit, RankUnreachable) else WorkerLost(str(culprit))
        if (loss := self._guard.loss) is not None:
            return loss.error()
        return WorkerLost(f"rank {min(silent)} does not answer: {error}") if silent else error
