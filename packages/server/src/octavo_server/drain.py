"""Drain: which requests are in progress, and how a server that is to stop takes no more and lets them end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from octavo_server.config import FREE_ROUTES
from octavo_server.errors import ApiError
from octavo_server.exchange import Exchange, current_exchange
from octavo_server.refusing import refuse

_log = logging.getLogger(__name__)


class Drain:
    """The requests in progress, but those of monitors, and whether there will be more.

    Args:
        on_refusal: called with each refusal.
        clock: seconds, monotonic.

    Attributes:
        is_begun: whether the server is to stop.
    """

    def __init__(
        self, on_refusal: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.is_begun = False
        self._exchanges: set[Exchange] = set()
        self._on_refusal = on_refusal
        self._clock = clock
        self._end = 0.0

    @property
    def num_requests(self) -> int:
        """Requests in progress."""
        return len(self._exchanges)

    def begin(self, seconds: float) -> None:
        """Take no more requests; those in progress have some seconds. What was begun goes on as it is."""
        if not self.is_begun:
            self._end = self._clock() + seconds
            self.is_begun = True

    @property
    def is_over(self) -> bool:
        """Whether nothing is in progress any more, or the time is up."""
        return self.is_begun and (not self._exchanges or self._clock() >= self._end)

    def end_all(self) -> None:
        """End what is in progress; each caller is told."""
        if self._exchanges:
            _log.warning("%d requests had not ended and were cut off", len(self._exchanges))
        for exchange in list(self._exchanges):
            exchange.end(_stopping("the server stopped before the request had ended; send it again"))

    def check(self) -> None:
        """Return if requests are taken.

        Raises:
            ApiError: 503 if the server is to stop.
        """
        if self.is_begun:
            raise _stopping("the server is about to stop and takes no more requests; send this one to another")

    def enter(self, exchange: Exchange) -> None:
        """Take a request in; the same error as `check`."""
        if self.is_begun:
            self._on_refusal()
        self.check()
        self._exchanges.add(exchange)

    def leave(self, exchange: Exchange) -> None:
        """Take note that a request has been answered."""
        self._exchanges.discard(exchange)


class DrainGate:
    """Lets no request pass once a drain has begun, but those of monitors."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in FREE_ROUTES:
            await self._app(scope, receive, send)
            return
        exchange = current_exchange()
        assert exchange is not None
        try:
            self._drain.enter(exchange)
        except ApiError as error:
            await refuse(error, scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.leave(exchange)


def _stopping(message: str) -> ApiError:
    return ApiError(
        503, message, type="server_error", code="shutting_down", headers={"retry-after": "5", "connection": "close"}
    )
