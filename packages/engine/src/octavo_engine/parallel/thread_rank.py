"""ThreadRank: for tests, a rank in a thread of this process, which starts at once and computes as a process does."""

from __future__ import annotations

import threading

from octavo_engine.parallel.follower import follow


class ThreadRank:
    """A `Worker` in a thread; it ends when rank 0 says so, or is gone.

    Args:
        host: where rank 0 is met.
        port: of it.
        rank: to run.
    """

    def __init__(self, host: str, port: int, rank: int) -> None:
        self._error = ""
        self._thread = threading.Thread(target=self._run, args=(host, port, rank), daemon=True)
        self._thread.start()

    def ended(self) -> str | None:
        """Return how the thread has ended; None while it runs."""
        return None if self._thread.is_alive() else f"has ended: {self._error}"

    def stop(self, seconds: float) -> None:
        """Wait for its end; a thread cannot be killed."""
        self._thread.join(max(seconds, 1.0))

    def _run(self, host: str, port: int, rank: int) -> None:
        try:
            follow(host, port, rank, join_seconds=10.0)
        except Exception as error:  # it is told by `ended`, as a process tells it by its log
            self._error = str(error)  # not the error, which would keep the rank's connections open
