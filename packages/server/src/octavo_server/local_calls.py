"""LocalCalls: requests that the server makes of its own routes, without a connection."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp, Message, Scope

from octavo_server.errors import error_response


class LocalAnswer(NamedTuple):
    """What a route answered."""

    status: int
    body: bytes


class LocalCalls:
    """Calls the routes of an app as HTTP would, past what guards its door: keys, limits of bodies and counts.

    Args:
        app: has all its routes and handlers by the first call.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._routes: ASGIApp | None = None

    async def post(self, path: str, body: bytes, state: dict[str, Any]) -> LocalAnswer:
        """Post JSON to a route; cancelling the call is what a client does that leaves.

        Args:
            path: of the route.
            body: JSON.
            state: what the door would have found out of the caller.
        """
        if self._routes is None:
            routes = AsyncExitStackMiddleware(self._app.router)
            self._routes = ExceptionMiddleware(routes, handlers=self._app.exception_handlers)
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": None,
            "server": None,
            "state": state,
            "app": self._app,
        }
        exchange = _Exchange(body)
        try:
            await self._routes(scope, exchange.receive, exchange.send)
        except Exception as error:  # the boundary: what no handler took is answered as at the door
            await error_response(error, path)(scope, exchange.receive, exchange.send)
        return LocalAnswer(exchange.status, b"".join(exchange.parts))


class _Exchange:
    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self.status = 500
        self.parts: list[bytes] = []

    async def receive(self) -> Message:
        if self._body is None:
            await asyncio.Event().wait()  # the caller stays until it is cancelled
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.parts.append(message.get("body", b""))
