"""Exchange: what is known of the HTTP request that is being served, for whatever serves it."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from octavo_server.keys import ApiKey


@dataclass(slots=True, eq=False)
class Exchange:
    """One HTTP request and its answer; the middleware makes it.

    Attributes:
        request_id: the caller's, or one that was made.
        key: whom the request comes from; None if no key is needed and none was sent.
        is_admin: whether it came with the admin key.
        arrival: in seconds of the monotonic clock.
    """

    request_id: str
    key: ApiKey | None = None
    is_admin: bool = False
    arrival: float = field(default_factory=time.monotonic)


_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


def current_exchange() -> Exchange | None:
    """Return the exchange of this task, or of the task that began it; None outside of any."""
    return _current.get()


def begin_exchange(exchange: Exchange) -> None:
    """Make an exchange that of the current task."""
    _current.set(exchange)
