"""Server-sent events: how a chunk is written, and how a stream of them is sent until the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

import pydantic_core
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo_server.errors import ApiError, to_api_error
from octavo_server.exchange import current_exchange
from octavo_server.generation import cancel_all, wait_for_disconnect
from octavo_server.outlet import WRITE_NOW, Outlet
from octavo_server.protocol.generation import StreamOptions

DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def to_json(value: Any) -> bytes:
    """Return a value as compact JSON; NaN and infinity are our own mistakes and raise ValueError."""
    return _encode(value).encode()


def json_response(value: Any) -> Response:
    """Return a JSON answer."""
    return Response(to_json(value), media_type="application/json")


class ChunkWriter:
    """Writes the chunks of one stream: id, model and time are encoded once, for all of them.

    Args:
        head: the members that every chunk repeats.
        options: what the client wants besides the choices.
        usage: gives the usage so far.
    """

    def __init__(
        self, head: Mapping[str, Any], options: StreamOptions | None, usage: Callable[[], dict[str, Any]]
    ) -> None:
        self._head = b"data: " + to_json(head)[:-1] + b',"choices":['
        self._usage = usage
        self._wants_usage = bool(options and options.include_usage)
        self._continuous = bool(options and options.continuous_usage_stats)

    def chunk(self, choice: Mapping[str, Any], members: Mapping[str, Any] | None = None) -> bytes:
        """Return an event with one choice, and further members beside the choices."""
        usage = b""
        if self._continuous:
            usage = b',"usage":' + to_json(self._usage())
        elif self._wants_usage:
            usage = b',"usage":null'
        beside = b"," + to_json(members)[1:-1] if members else b""
        # A choice's only floats are its log-probabilities: without them nothing can be NaN, and a quicker encoder does.
        encoded = pydantic_core.to_json(choice) if choice.get("logprobs") is None else to_json(choice)
        return self._head + encoded + b"]" + beside + usage + b"}\n\n"

    def end(self) -> bytes:
        """Return what stands after the last choice: the usage, if it was asked for, and the end mark."""
        if not self._wants_usage:
            return DONE
        return self._head + b'],"usage":' + to_json(self._usage()) + b"}\n\n" + DONE


Produce = Callable[[Outlet], Awaitable[None]]
"""Writes the events of a stream and returns at its end; cancelled when the client leaves."""


def drawn_from(events: AsyncGenerator[bytes, None]) -> Produce:
    """Let a generator make the events, each when the one before has been sent."""

    async def produce(outlet: Outlet) -> None:
        async with aclosing(events):
            async for event in events:
                outlet.write(event)
                await outlet.drained()

    return produce


class EventStream(Response):
    """A response of server-sent events; when the client leaves, whoever produces them is cancelled at once.

    An error after the start becomes one last event in OpenAI's error shape, without an end mark.

    Args:
        produce: writes whole events, as bytes.
        keep_alive: seconds of silence after which a comment is sent.
        error_event: writes an error after the start.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        produce: Produce,
        *,
        keep_alive: float,
        error_event: Callable[[ApiError], bytes] = lambda error: b"data: " + to_json(error.body()) + b"\n\n",
    ) -> None:
        self._error_event = error_event
        self._produce = produce
        self._keep_alive = keep_alive
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        exchange = current_exchange()
        outlet = Outlet(send, scope.get("extensions", {}).get(WRITE_NOW))
        work = asyncio.create_task(self._work(outlet))
        others = [asyncio.create_task(wait_for_disconnect(receive)), asyncio.create_task(self._ping(outlet))]
        try:
            await asyncio.wait({work, others[0]}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except asyncio.CancelledError:
            if exchange is not None and exchange.ended_by is not None:  # the client is there, and is told why
                await cancel_all([work, *others])
                await outlet.end(self._error_event(exchange.ended_by))
            raise
        finally:
            await cancel_all([work, *others])
            outlet.close()

    async def _work(self, outlet: Outlet) -> None:
        last = b""
        try:
            await self._produce(outlet)
        except Exception as error:  # the boundary: the status is sent, so the error becomes an event
            last = self._error_event(to_api_error(error))
        await outlet.end(last)

    async def _ping(self, outlet: Outlet) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            silence = clock() - outlet.last_sent
            if silence >= self._keep_alive:
                outlet.write(_PING)
            await asyncio.sleep(self._keep_alive - min(silence, self._keep_alive) or self._keep_alive)
