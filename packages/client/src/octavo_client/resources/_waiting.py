"""How the resources wait for what takes long: looks at growing intervals, until a time."""

import time
from collections.abc import Iterator

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
_GROWTH = 1.5


def pauses(what: str, timeout: float | None) -> Iterator[float]:
    """Return the seconds to wait between looks.

    Raises:
        TimeoutError: once `timeout` seconds have passed.
    """
    end = None if timeout is None else time.monotonic() + timeout
    pause = FIRST_PAUSE
    while True:
        left = pause if end is None else end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{what} has not ended within {timeout:g} seconds")
        yield min(pause, left)
        pause = min(pause * _GROWTH, LONGEST_PAUSE)
