"""The program of a worker process: `python -m octavo_engine.parallel.worker HOST PORT RANK`; `launch` starts it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence

_log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Run a rank until rank 0 says stop, or ends; the exit code is 0 in the former case."""
    host, port, rank = arguments[0], int(arguments[1]), int(arguments[2])
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to rank 0 too, which knows when to stop
    threading.Thread(target=_end_with_parent, name="octavo-parent", daemon=True).start()
    from octavo_engine.errors import EngineError
    from octavo_engine.parallel.follower import follow
    from octavo_engine.parallel.team import JOIN_SECONDS

    try:
        follow(host, port, rank, join_seconds=JOIN_SECONDS, ends_process=True)
    except EngineError as error:
        _log.error("%s: %s", type(error).__name__, error)
        return 1
    return 0


def _end_with_parent() -> None:
    """End this process when whoever started it is gone, in the middle of anything."""
    os.read(0, 1)  # returns when the other end is closed: nothing is written to it
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
