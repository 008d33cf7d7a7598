"""Worker: a process of this machine that runs one rank, started and watched here; it ends when this process does."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Protocol

_log = logging.getLogger(__name__)


class Worker(Protocol):
    """Whatever runs a rank."""

    def ended(self) -> str | None:
        """Return how it has ended, as the end of a sentence about the rank; None while it runs."""
        ...

    def stop(self, seconds: float) -> None:
        """Wait for its end so long, then end it."""
        ...


Launch = Callable[[str, int, int], Worker]
"""Starts a rank that meets rank 0: (host, port, rank)."""


class StartedRank:
    """A rank that somebody else has started, and watches, on whatever machine.

    Args:
        host: where rank 0 is met.
        port: of it.
        rank: that was started.
    """

    def __init__(self, host: str, port: int, rank: int) -> None:
        """Start nothing."""

    def ended(self) -> str | None:
        """Return None: others know."""
        return None

    def stop(self, seconds: float) -> None:
        """End nothing: the rank ends by itself when rank 0 says stop, or is gone."""


class WorkerProcess:
    """A rank in a process of its own.

    Its standard input is a pipe that nothing is written to: it ends with whoever holds the other end, so that no worker
    outlives the engine, however that ends. The log says at once when one ends unasked.

    Args:
        host: where rank 0 is met.
        port: of it.
        rank: to run.
    """

    def __init__(self, host: str, port: int, rank: int) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        self._rank = rank
        self._stopping = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "octavo_engine.parallel.worker", host, str(port), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
        )
        threading.Thread(target=self._watch, name=f"octavo-rank-{rank}", daemon=True).start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ended(self) -> str | None:
        """Return how the process has ended; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        if code >= 0:
            return f"(process {self.pid}) has ended with exit code {code}"
        with contextlib.suppress(ValueError):  # a signal without a name
            return f"(process {self.pid}) was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"(process {self.pid}) was killed by signal {-code}"

    def stop(self, seconds: float) -> None:
        """Let the process end, and kill it if it does not."""
        self._stopping = True
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _watch(self) -> None:
        self._process.wait()
        if self._process.returncode and not self._stopping:
            _log.error("rank %d %s", self._rank, self.ended())
