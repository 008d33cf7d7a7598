"""LocalCalls: requests that the server makes of its own routes, without a connection."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from typing import NamedTuple

from fastapi import FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp, Message, Scope

from octavo_server.errors import error_response
from octavo_server.exchange import Exchange
from octavo_server.keys import ApiKey


class LocalAnswer(NamedTuple):
    """What a route answered."""

    status: int
    body: bytes
    request_id: str


class LocalCalls:
    """Calls the routes of an app as HTTP would, past what guards its door: keys, limits of rates and bodies, counts.

    Args:
        app: has all its routes and handlers by the first call.
        keys: the API keys by the owners that they make.
    """

    def __init__(self, app: FastAPI, keys: Mapping[str, ApiKey]) -> None:
        self._app = app
        self._keys = keys
        self._routes: ASGIApp | None = None

    async def post(self, path: str, body: bytes, owner: str) -> LocalAnswer:
        """Post JSON to a route; cancelling the call is what a client does that leaves.

        It is served as the current task, whose exchange it replaces.

        Args:
            path: of the route.
            body: JSON.
            owner: in whose name.
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
            "state": {"owner": owner},
            "app": self._app,
        }
        wire, exchange = _Wire(body), own_exchange(self._keys.get(owner))
        try:
            await self._routes(scope, wire.receive, wire.send)
        except asyncio.CancelledError:
            if exchange.ended_by is None:
                raise
            exchange.task.uncancel()
            await error_response(exchange.ended_by, path)(scope, wire.receive, wire.send)
        except Exception as error:  # the boundary: what no handler took is answered as at the door
            await error_response(error, path)(scope, wire.receive, wire.send)
        finally:
            exchange.close()
        return LocalAnswer(wire.status, b"".join(wire.parts), exchange.request_id)


def own_exchange(key: ApiKey | None) -> Exchange:
    """Begin an exchange of the current task, which this server asks of itself, in the name of a key."""
    task = asyncio.current_task()
    assert task is not None
    exchange = Exchange(uuid.uuid4().hex, task, key=key)
    exchange.begin()
    return exchange


class _Wire:
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
