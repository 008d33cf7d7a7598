"""RequestContext: the outermost layer, in which a request gets its id, its time, its answer and its line in the log."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo_server.errors import CLIENT_GONE, ApiError, error_response
from octavo_server.exchange import Exchange

_log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Answer(NamedTuple):
    """How a request ended.

    Attributes:
        exchange: the request.
        scope: ASGI's.
        status: what was sent, or CLIENT_GONE.
        finished: when, in seconds of the monotonic clock.
    """

    exchange: Exchange
    scope: Scope
    status: int
    finished: float

    @property
    def method(self) -> str:
        """The HTTP method."""
        method: str = self.scope["method"]
        return method

    @property
    def route(self) -> str:
        """The template of the path, so that there are not more of them than routes."""
        return getattr(self.scope.get("route"), "path", "unmatched")

    @property
    def seconds(self) -> float:
        """From the arrival to the last byte of the answer."""
        return self.finished - self.exchange.arrival


Observer = Callable[[Answer], None]


class RequestContext:
    """Gives each request its id and its time, answers what nobody foresaw, and tells of each answer.

    Args:
        app: the layers below.
        observers: are told of each answer when it has ended.
        routes: all there are, to name the one of a request that was refused before it came there.
        request_timeout: seconds that every request may take; None sets no limit.
    """

    def __init__(
        self,
        app: ASGIApp,
        observers: Sequence[Observer],
        routes: Sequence[BaseRoute],
        request_timeout: float | None = None,
    ) -> None:
        self._app = app
        self._observers = observers
        self._routes = routes
        self._request_timeout = request_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        task = asyncio.current_task()
        assert task is not None
        request_id = _request_id(scope)
        wire = _Wire(receive, send, request_id)
        exchange = Exchange(request_id, task)
        exchange.begin()
        try:
            await self._serve(exchange, wire, scope)
        except Exception as error:  # the boundary: whatever a route forgot becomes a 500 with an id to look for
            if not isinstance(error, ApiError):
                _log.error("request %s failed", exchange.request_id)
            if wire.status is not None:
                raise
            await error_response(error, scope["path"])(scope, wire.receive, wire.send)
        finally:
            exchange.close()
            if "route" not in scope:
                self._find_route(scope)
            answer = Answer(exchange, scope, wire.outcome, time.monotonic())
            for observe in self._observers:
                observe(answer)

    def _find_route(self, scope: Scope) -> None:
        route = next((route for route in self._routes if route.matches(scope)[0] is not Match.NONE), None)
        if route is not None:
            scope["route"] = route

    async def _serve(self, exchange: Exchange, wire: _Wire, scope: Scope) -> None:
        for seconds in (self._request_timeout, _wanted_timeout(scope)):
            if seconds is not None:
                exchange.limit_time(seconds)
        try:
            await self._app(scope, wire.receive, wire.send)
        except asyncio.CancelledError:
            if exchange.ended_by is None:
                raise
            exchange.task.uncancel()
            if wire.status is None:
                raise exchange.ended_by from None


class _Wire:
    """One request's messages in both directions, watched."""

    def __init__(self, receive: Receive, send: Send, request_id: str) -> None:
        self._receive = receive
        self._send = send
        self._gone = False
        self._complete = False
        self.request_id = request_id
        self.status: int | None = None

    @property
    def outcome(self) -> int:
        """The status to count: what was sent, unless the client left before the end of it."""
        return self.status if self._complete and self.status is not None else CLIENT_GONE if self._gone else 500

    async def receive(self) -> Message:
        message = await self._receive()
        self._gone = self._gone or message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.request_id
        elif not self._gone:
            self._complete = not message.get("more_body", False)
        await self._send(message)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _wanted_timeout(scope: Scope) -> float | None:
    given = Headers(scope=scope).get("x-request-timeout")
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ApiError(
            400, f"X-Request-Timeout must be a number of seconds above 0, got {given[:40]!r}", param="X-Request-Timeout"
        )
    return seconds
