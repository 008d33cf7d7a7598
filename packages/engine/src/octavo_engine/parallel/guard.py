"""Guard: what a rank does about others that are lost: it lets its own work fail at once, and knows why it did."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from octavo_engine.errors import WorkerLost
from octavo_engine.parallel.meeting import meet
from octavo_engine.parallel.pulse import Loss, Pulse
from octavo_engine.parallel.rendezvous import Rendezvous

RANK_TIMEOUT = 6.0
"""Seconds that a machine may be out of reach before its ranks count as lost; see `EngineConfig.rank_timeout`."""

STUCK_SECONDS = 10.0
"""After a loss, within which a process that is a rank and nothing else must have ended by itself."""

_log = logging.getLogger(__name__)


class Guard:
    """Watches all other ranks of a model from one of them, whichever, and takes in which are lost.

    Args:
        rank: of this process.
        cut: lets everything fail that waits for other ranks, and all that comes.
        ends_process: whether to end this process if it hangs on to a lost rank where `cut` does not reach.

    Attributes:
        losses: what is known of the ranks that were lost since `watch`, in that order.
    """

    def __init__(self, rank: int, cut: Callable[[], None], *, ends_process: bool = False) -> None:
        self.losses: dict[int, Loss] = {}
        self._rank = rank
        self._cut = cut
        self._ends_process = ends_process
        self._pulse: Pulse | None = None

    def watch(self, rendezvous: Rendezvous, size: int, *, wait: float, seconds: float = RANK_TIMEOUT) -> None:
        """Connect with all other ranks, which do so too, and watch them until `close`.

        Args:
            rendezvous: of the ranks.
            size: how many there are.
            wait: seconds within which all must have come.
            seconds: that a machine may be out of reach; rank 0's holds for all.

        Raises:
            WorkerLost: one did not come, or cannot be reached from here.
        """
        self._pulse = meet(rendezvous, self._rank, size, self._take, seconds=seconds, wait=wait)

    def expect_beats(self, patience: float) -> None:
        """See `Pulse.expect_beats`."""
        assert self._pulse is not None, "nobody is watched"
        self._pulse.expect_beats(patience)

    @property
    def loss(self) -> Loss | None:
        """The loss that explains the others; None while there is none.

        That a machine cannot be reached goes before a process that ends, since it is why the latter does.
        """
        losses = list(self.losses.values())
        return next((loss for loss in losses if loss.is_unreachable), losses[0] if losses else None)

    def check(self) -> None:
        """Return if nobody was lost.

        Raises:
            RankUnreachable, WorkerLost: the one who was, and how.
        """
        if (loss := self.loss) is not None:
            raise loss.error()

    def reason(self, error: Exception) -> Exception:
        """Return why something failed: a lost rank, if one was and this may come of it, else the error itself."""
        loss = self.loss
        return error if loss is None or not isinstance(error, WorkerLost) else loss.error()

    def close(self, *, says_farewell: bool) -> None:
        """Watch no more, and forget the losses; see `Pulse.close`."""
        if self._pulse is not None:
            self._pulse.close(says_farewell=says_farewell)
            self._pulse = None
        self.losses = {}

    def _take(self, loss: Loss) -> None:
        """Take in that a rank was lost, in the thread of the pulse."""
        self.losses[loss.rank] = loss
        _log.log(logging.ERROR if loss.is_unreachable else logging.WARNING, "rank %d: %s", self._rank, loss.error())
        if self._ends_process:
            timer = threading.Timer(STUCK_SECONDS, self._end_process)
            timer.daemon = True
            timer.start()
        self._cut()

    def _end_process(self) -> None:
        _log.error("rank %d: still not at its end %g s after a rank was lost; it is ended", self._rank, STUCK_SECONDS)
        os._exit(1)
