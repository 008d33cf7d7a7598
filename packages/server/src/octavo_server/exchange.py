"""Exchange: what is known of the HTTP request that is being served, and how it is ended before its time."""

from __future__ import annotations

import asyncio
import math
import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from octavo_engine.types import Request, RequestTimes
from octavo_server.errors import ApiError
from octavo_server.keys import ApiKey
from octavo_server.rate_limits import KeyBudget

_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


@dataclass(slots=True, eq=False)
class EngineWork:
    """What the engine did for one of an HTTP request's prompts; filled in as it comes.

    Attributes:
        request: the engine's.
        num_tokens: generated, over all choices.
        num_cached_tokens: of the prompt.
        first_token: when the first token came, in seconds of the monotonic clock; None before.
        times: the engine's own; None before its first choice has ended.
        finish_reasons: of the choices that have ended.
    """

    request: Request
    num_tokens: int = 0
    num_cached_tokens: int = 0
    first_token: float | None = None
    times: RequestTimes | None = None
    finish_reasons: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Exchange:
    """One HTTP request and its answer; the middleware makes it.

    Attributes:
        request_id: the caller's, or one that was made.
        task: serves it.
        key: whom the request comes from; None if no key is needed and none was sent.
        is_admin: whether it came with the admin key.
        budget: what is left of the key's limits; None if it has none.
        work: what the engine did for it.
        arrival: in seconds of the monotonic clock.
        ended_by: why it ends before its time; None if it does not.
    """

    request_id: str
    task: asyncio.Task[None]
    key: ApiKey | None = None
    is_admin: bool = False
    budget: KeyBudget | None = None
    work: list[EngineWork] = field(default_factory=list)
    arrival: float = field(default_factory=time.monotonic)
    ended_by: ApiError | None = None
    _deadline: float = math.inf
    _timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Make this the exchange of the current task, and of those that it begins."""
        _current.set(self)

    def end(self, error: ApiError) -> None:
        """End the request now: what serves it is cancelled, wherever it stands, and the caller is told the error."""
        if self.ended_by is None:
            self.ended_by = error
            self.task.cancel()

    def limit_time(self, seconds: float) -> None:
        """End the request when so many seconds have passed since it came, unless an earlier time was set."""
        if self.arrival + seconds >= self._deadline:
            return
        self.close()
        self._deadline = self.arrival + seconds
        left = self._deadline - time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(left, self.end, _timed_out(seconds))

    def close(self) -> None:
        """Take note that the request has been answered, or is given another deadline."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def current_exchange() -> Exchange | None:
    """Return the exchange of this task, or of the task that began it; None outside of any."""
    return _current.get()


def _timed_out(seconds: float) -> ApiError:
    # Clients retry a 504 by themselves, which would begin the same work again.
    return ApiError(
        504,
        f"the request did not end within {seconds:g} seconds; ask for less, or allow more time",
        type="timeout_error",
        code="timeout",
        headers={"x-should-retry": "false"},
    )
