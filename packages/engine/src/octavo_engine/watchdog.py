"""Watchdog: notices when an engine makes no step though it should, and when it goes on."""

from __future__ import annotations

import faulthandler
import logging
import tempfile
import threading
import time
from collections.abc import Callable

from octavo_engine.errors import EngineStuck

_log = logging.getLogger(__name__)

_NUM_LOOKS = 8  # within the limit


class Watchdog:
    """Looks at an engine's progress from a thread of its own; when there is none, the log gets all stacks, once.

    Args:
        progress: a number that changes whenever the engine gets on; None while it has nothing to do.
        limit: seconds without progress after which the engine is stuck.
        clock: seconds, monotonic.
    """

    def __init__(
        self, progress: Callable[[], int | None], limit: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._progress = progress
        self._limit = limit
        self._clock = clock
        self._last: int | None = None
        self._since = clock()
        self._stuck = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="octavo-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        self._thread.join()

    def check(self) -> None:
        """Return if the engine gets on, as far as is known; raise EngineStuck if not."""
        if self._stuck:
            raise EngineStuck(f"the engine has made no step for {self._clock() - self._since:.0f} s; its log says more")

    def look(self) -> None:
        """Compare the progress with that of the last look."""
        progress, now = self._progress(), self._clock()
        if progress is None or progress != self._last:
            if self._stuck:
                _log.warning("the engine goes on after %.1f s", now - self._since)
            self._last, self._since, self._stuck = progress, now, False
        elif not self._stuck and now - self._since >= self._limit:
            self._stuck = True
            _log.error("the engine has made no step for %.1f s; all threads:\n%s", now - self._since, _all_stacks())

    def _run(self) -> None:
        while not self._closed.wait(self._limit / _NUM_LOOKS):
            self.look()


def _all_stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:  # it writes to a file descriptor, without help of the interpreter
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
