"""MendingTeam: a team whose lost ranks are replaced beside the engine's loop, however long it takes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

from octavo_engine.errors import EngineError, WorkerLost
from octavo_engine.parallel.job import Job
from octavo_engine.parallel.launch import Launch
from octavo_engine.parallel.team import Team

PAUSE_SECONDS = 2.0
"""Between two attempts to replace the ranks."""

_MOMENT_SECONDS = 0.05

_log = logging.getLogger(__name__)


class MendingTeam(Team):
    """A team for machines that can come back: it tries to replace lost ranks in a thread of its own until that works.

    Meanwhile no step runs, and the engine's loop goes on: requests can be queued and aborted.

    Args:
        job: what the ranks run.
        launch: starts one; it fails where there is no room for it.
        on_close: called when the team is closed.
        **options: of `Team`.
    """

    def __init__(self, job: Job, launch: Launch, on_close: Callable[[], None], **options: Any) -> None:
        super().__init__(job, launch, **options)
        self._on_close = on_close
        self._mending: threading.Thread | None = None
        self._closing = threading.Event()

    @property
    def is_lost(self) -> bool:
        """Whether the ranks must be replaced before the next step, or are being replaced."""
        return self._mending is not None or super().is_lost

    def are_ready(self) -> bool:
        """Let lost ranks be replaced, wait a moment for it, and return whether it is done."""
        if self._mending is None and self.is_lost:
            self._mending = threading.Thread(target=self._mend, name="octavo-mending", daemon=True)
            self._mending.start()
        if self._mending is not None:
            self._mending.join(_MOMENT_SECONDS)
            if self._mending.is_alive():
                return False
            self._mending = None
        return not self.is_lost

    def close(self) -> None:
        """End all ranks, and attempts to replace them."""
        self._closing.set()
        if self._mending is not None:
            self._mending.join()
            self._mending = None
        super().close()
        self._on_close()

    def _mend(self) -> None:
        while not self._closing.is_set():
            try:
                self.restart()
            except EngineError as error:
                _log.error("the ranks are not replaced yet, next attempt in %g s: %s", PAUSE_SECONDS, error)
                self._closing.wait(PAUSE_SECONDS)
            else:
                return

    def _look(self, ranks: Iterable[int]) -> None:
        if self._closing.is_set():
            raise WorkerLost("the engine was closed while its ranks were being replaced")
        super()._look(ranks)
