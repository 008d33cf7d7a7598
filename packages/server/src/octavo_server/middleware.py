"""What every request passes on its way in: the web origins, the limits of its key, and those of its body."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo_server.errors import ApiError, error_response
from octavo_server.exchange import current_exchange
from octavo_server.rate_limits import KeyBudget
from octavo_server.refusing import forget_body, refuse

EXPOSED_HEADERS = (
    "x-request-id",
    "retry-after",
    "retry-after-ms",
    *(f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
)
"""What pages of allowed origins may read of an answer."""

_READING = frozenset({"GET", "HEAD", "OPTIONS"})

SLOWEST_UPLOAD = 16 << 10
"""Bytes a second that an upload must come at, in the mean."""


class Cors(CORSMiddleware):
    """Lets browsers of the allowed origins in; a refused preflight is answered in OpenAI's error shape."""

    def __init__(self, app: ASGIApp, allowed_origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=allowed_origins,
            allow_methods=["DELETE", "GET", "POST"],
            allow_headers=["*"],  # OpenAI's client in a browser sends a dozen of its own; credentials are not allowed
            expose_headers=EXPOSED_HEADERS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a browser's question whether it may call."""
        response = super().preflight_response(request_headers)
        if response.status_code != 400:
            return response
        return error_response(
            ApiError(400, "this origin, method or header is not allowed here; see --allowed-origin", code="cors")
        )


class RateGate:
    """Holds each key to its limits, and says in every answer what is left of them."""

    def __init__(self, app: ASGIApp, budgets: Mapping[str, KeyBudget]) -> None:
        self._app = app
        self._budgets = budgets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = current_exchange() if scope["type"] == "http" else None
        budget = None if exchange is None or exchange.key is None else self._budgets.get(exchange.key.name)
        if exchange is None or budget is None or scope["method"] in _READING:
            await self._app(scope, receive, send)
            return
        try:
            budget.enter()
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        exchange.budget = budget

        async def send_what_is_left(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(budget.headers())
            await send(message)

        try:
            await self._app(scope, receive, send_what_is_left)
        finally:
            budget.leave()


class BodyLimit:
    """Refuses bodies that are too large, by their declared length or by what comes, and those that come too slowly.

    Args:
        app: what the others pass on to.
        max_body_bytes: the largest body.
        timeout: seconds within which a body must have come.
        uploads: paths that take files, with the largest body of each; theirs have as long as their size takes at
            `SLOWEST_UPLOAD`.
    """

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, timeout: float, uploads: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._timeout = timeout
        self._uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        limit = self._uploads.get(scope["path"])
        max_bytes = self._max_body_bytes if limit is None else limit
        if declared.isdecimal() and int(declared) > max_bytes:
            await refuse(_too_large(max_bytes, f"{int(declared)} bytes"), scope, receive, send)
            return
        await self._app(scope, self._limited(receive, max_bytes, is_upload=limit is not None), send)

    def _limited(self, receive: Receive, max_bytes: int, *, is_upload: bool) -> Receive:
        num_bytes = 0
        complete = False
        started = asyncio.get_running_loop().time()

        async def limited() -> Message:
            nonlocal num_bytes, complete
            if complete:
                return await receive()
            allowed = self._timeout + (num_bytes / SLOWEST_UPLOAD if is_upload else 0)
            try:
                async with asyncio.timeout_at(started + allowed):
                    message = await receive()
            except TimeoutError:
                raise _too_slow(allowed) from None
            num_bytes += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if num_bytes > max_bytes:
                if not complete:
                    await forget_body(receive)
                raise _too_large(max_bytes, "more")
            return message

        return limited


def _too_large(max_bytes: int, came: str) -> ApiError:
    return ApiError(
        413,
        f"the body may have {max_bytes} bytes, got {came}; send less, or raise --max-body-bytes (for files"
        " --max-file-bytes)",
        code="body_too_large",
        headers={"connection": "close"},
    )


def _too_slow(timeout: float) -> ApiError:
    return ApiError(
        408, f"the body did not come within {timeout:g} seconds", code="body_timeout", headers={"connection": "close"}
    )
