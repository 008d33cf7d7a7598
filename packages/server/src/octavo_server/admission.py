"""Admission: how many requests may be in the engine at once, and what those beyond are told."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable
from math import ceil
from types import TracebackType
from typing import Self

from octavo_server.errors import ApiError

_NUM_REMEMBERED = 64  # ends of requests, by which the wait is estimated
_MAX_WAIT = 60


class Admission:
    """Counts the requests that have been taken in; refuses one when there are too many.

    Args:
        max_num_requests: prompts that may run or wait at once. An HTTP request with more of them is taken when there
            are no others.
        on_refusal: called with each refusal.
        clock: seconds, monotonic.

    Attributes:
        num_requests: those that have been taken in and have not ended.
    """

    def __init__(
        self,
        max_num_requests: int,
        on_refusal: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_num_requests = max_num_requests
        self.num_requests = 0
        self._on_refusal = on_refusal
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=_NUM_REMEMBERED)

    def enter(self, count: int) -> Ticket:
        """Take requests in.

        Raises:
            ApiError: 503 if there are too many, with the seconds after which there should be room.
        """
        if self.num_requests and self.num_requests + count > self.max_num_requests:
            self._on_refusal()
            wait = self._estimated_wait(self.num_requests + count - self.max_num_requests)
            raise ApiError(
                503,
                f"the server has {self.num_requests} requests, and takes {self.max_num_requests} at most; try again in "
                f"about {wait} s",
                type="server_error",
                code="overloaded",
                headers={"retry-after": str(wait)},
            )
        self.num_requests += count
        return Ticket(self, count)

    def leave(self, count: int) -> None:
        """Take note that requests have ended; their ticket calls it."""
        self.num_requests -= count
        self._ends.extend([self._clock()] * count)

    def _estimated_wait(self, num_too_many: int) -> int:
        """Return the seconds in which so many requests end at the pace of the last ones."""
        if len(self._ends) < 2:
            return 1
        pace = (self._clock() - self._ends[0]) / len(self._ends)
        return min(max(ceil(num_too_many * pace), 1), _MAX_WAIT)


class Ticket:
    """The right of some requests to be there; it ends once, at the latest when nobody holds the ticket any more."""

    def __init__(self, admission: Admission, count: int) -> None:
        self._end = weakref.finalize(self, admission.leave, count)

    def leave(self) -> None:
        """Say that the requests have ended."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
