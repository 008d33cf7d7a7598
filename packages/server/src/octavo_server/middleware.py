"""What every request passes on its way in: an id and a count, the web origins, and the body's limits."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo_server.errors import CLIENT_GONE, ApiError, error_response
from octavo_server.exchange import Exchange, begin_exchange
from octavo_server.metrics import Metrics

_log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_DRAIN_BYTES = 16 << 20
_DRAIN_SECONDS = 2.0


class RequestContext:
    """Gives each request its id, answers what nobody foresaw, and counts the request by its outcome."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(_request_id(scope))
        begin_exchange(exchange)
        wire = _Wire(receive, send, exchange.request_id)
        try:
            await self._app(scope, wire.receive, wire.send)
        except Exception as error:  # the boundary: whatever a route forgot becomes a 500 with an id to look for
            _log.error("request %s failed", exchange.request_id)
            if wire.status is not None:
                raise
            await error_response(error, scope["path"])(scope, wire.receive, wire.send)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.observe_http(scope["method"], route, wire.outcome, time.monotonic() - exchange.arrival)


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


class Cors(CORSMiddleware):
    """Lets browsers of the allowed origins in; a refused preflight is answered in OpenAI's error shape."""

    def __init__(self, app: ASGIApp, allowed_origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=allowed_origins,
            allow_methods=["DELETE", "GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key", "x-request-id"],
            expose_headers=["x-request-id"],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a browser's question whether it may call."""
        response = super().preflight_response(request_headers)
        if response.status_code != 400:
            return response
        return error_response(
            ApiError(400, "this origin, method or header is not allowed here; see --allowed-origin", code="cors")
        )


class BodyLimit:
    """Refuses bodies that are too large, by their declared length or by what comes, and those that come too slowly."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, timeout: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            if "expect" not in headers:
                await _drain(receive)
            await error_response(self._too_large(f"{int(declared)} bytes"), scope["path"])(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        num_bytes = 0
        complete = False
        deadline = asyncio.get_running_loop().time() + self._timeout

        async def limited() -> Message:
            nonlocal num_bytes, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise _too_slow(self._timeout) from None
            num_bytes += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if num_bytes > self._max_body_bytes:
                if not complete:
                    await _drain(receive)
                raise self._too_large("more")
            return message

        return limited

    def _too_large(self, came: str) -> ApiError:
        return ApiError(
            413,
            f"the body may have {self._max_body_bytes} bytes, got {came}; send less, or raise --max-body-bytes",
            code="body_too_large",
            headers={"connection": "close"},
        )


def _too_slow(timeout: float) -> ApiError:
    return ApiError(
        408, f"the body did not come within {timeout:g} seconds", code="body_timeout", headers={"connection": "close"}
    )


async def _drain(receive: Receive) -> None:
    """Read and forget a part of a body: a client that is still sending would otherwise miss the answer."""
    num_bytes = 0
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while num_bytes < _DRAIN_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        _log.info("a refused body was still coming after %g seconds", _DRAIN_SECONDS)
